"""Draw glue_tune.png from glue_tune.json: the learning rates, chosen on the validation split.

python -m figures.glue_tune [JSON]
The JSON is written by train_glue.py --tune --out figures/glue_tune.json.
"""

import sys
from pathlib import Path

from figures.plots import draw_rates as draw

if __name__ == "__main__":
    print(draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")))
