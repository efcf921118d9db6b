"""`dataset=` takes a file in the format in which it was published."""

from pathlib import Path

import pyarrow
import pyarrow.parquet

from arealite.testing import make_tiny_model
from recipes import gsm8k_grpo
from tests.data.published import PUBLISHED
from tests.recipes.scripted import run_with_policy


def test_gsm8k_grpo_trains_on_a_file_of_dapo(tmp_path: Path):
    published = PUBLISHED["DAPO"]
    rows = [published.row | {"extra_info": {"index": str(index)}} for index in range(4)] * 3
    path = tmp_path / "dapo-math-17k.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    def policy(conversation: str) -> str:
        assert published.question in conversation
        return published.right

    model = make_tiny_model(tmp_path / "model", max_model_len=1_024)
    last = run_with_policy(
        gsm8k_grpo, policy, tmp_path / "run", f"dataset={path}", f"model={model}"
    )
    assert last["rollout/reward"] == last["eval/reward"] == 1.0
