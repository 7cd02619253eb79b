import pytest

from support.build import kernel


@pytest.fixture(scope="session")
def fused():
    """The operator for the CPU: (target, draft, tokens, coins, temperature, block) -> kept, next
    token, status."""
    if not kernel("cpu"):
        pytest.skip("no kernel here: no compiler, no ninja, or AURORA_KERNEL=torch")
    return kernel("cpu")
