"""One step on as many ranks as torchrun starts; rank 0 writes its gradient norm.

torchrun --nproc-per-node 2 -m tests.gpu.one_step MODEL OUT
"""

import json
import sys
from pathlib import Path

from arealite import dist
from arealite.training.fsdp import FSDPEngine
from tests.training.helpers import CFG, minibatch_of, train_step


def main(model: str, out: Path) -> None:
    dist.init()
    with FSDPEngine(model, CFG) as engine:
        stats = train_step(engine, minibatch_of(max_tokens=64))
    if dist.rank() == 0:
        out.write_text(json.dumps({"grad_norm": stats.grad_norm}))
    dist.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
