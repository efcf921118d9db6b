"""What the client adds to the contract of all engines; for that, see test_conformance.py."""

import pytest

from arealite.errors import ServerError
from arealite.inference.vllm import VLLMEngine


def test_an_address_where_nobody_answers_is_named_with_what_to_do():
    with pytest.raises(ServerError, match=r"No vLLM server answered at http://127.0.0.1:9 .*serve"):
        VLLMEngine(["http://127.0.0.1:9"])
