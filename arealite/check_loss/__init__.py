"""Does a loss stay the same however a batch is cut, ordered, packed and spread over ranks?"""

from arealite.check_loss.check import LossCheck, check_loss

__all__ = ["LossCheck", "check_loss"]
