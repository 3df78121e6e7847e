"""Draw vit_tune.png from vit_tune.json: the learning rates, chosen on the validation split.

python -m figures.vit_tune [JSON]
The JSON is written by train_vit.py --tune --out figures/vit_tune.json.
"""

import sys
from pathlib import Path

from figures.plots import draw_rates as draw

if __name__ == "__main__":
    print(draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")))
