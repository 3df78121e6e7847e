"""Draw glue_minilm_tune.png from glue_minilm_tune.json: the learning rates for a few rows of GLUE.

python -m figures.glue_minilm_tune [JSON]
The JSON is written by train_glue.py --backbone MINILM --data GLUE --train 200 --evaluate 200
--batch-size 8 --mixed-precision bf16 --tune --out figures/glue_minilm_tune.json.
"""

import sys
from pathlib import Path

from figures.plots import draw_rates as draw

if __name__ == "__main__":
    print(draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")))
