"""What the scripts share. Modules import from here before they import torch, so what torch reads when it loads is set here."""

import os

# Rounds that torch's threads spin before they sleep when they wait for each other. With the default, 300,000, three runs
# at once on two cores take 1.8 s a step each, with 1,000 they take 0.04 s; one run alone is as fast with either.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
