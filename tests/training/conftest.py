from collections.abc import Iterator

import pytest
import torch

from arealite import dist
from arealite.testing import make_tiny_model


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Qwen2-shaped float32 model with a tied head."""
    return make_tiny_model(tmp_path_factory.mktemp("qwen2"), dtype=torch.float32)


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """Leaves the process group; one thread, as more only wait for each other on tiny models."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
    dist.close()
