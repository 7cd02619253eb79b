"""What is shipped works."""

import pytest
import torch

from draft import load_draft
from support.draft_length import FixedLength
from support.options import STATIC, WEIGHTS
from support.store import load_target
from verify import RULES

from .tiny import play, request

torch.set_num_threads(1)


@pytest.mark.parametrize("rule", RULES)
def test_shipped_weights_speculate(rule):
    """The static draft keeps more than one token of a round of what the target says."""
    target, _ = load_target(WEIGHTS / "target.pt")
    draft, _ = load_draft(STATIC["static"], target)
    r = request(new=64, temperature=0.8)
    r.prompt = [256, *b"import os\nimport sys\n\n\ndef main(argv):\n    "]
    run, rounds = play(target.eval(), draft, [r], FixedLength(4), rule=rule)
    assert len(rounds) < 40
