"""Transfer of experts to other base models, with a report of what fits and with controls (Transformer², Table 5)."""

from peft_svf.experts.transfer.controls import CONTROLS, Control
from peft_svf.experts.transfer.report import MatrixTransfer, TransferReport
from peft_svf.experts.transfer.transfer import Transfer, transfer


__all__ = ["CONTROLS", "Control", "MatrixTransfer", "Transfer", "TransferReport", "transfer"]
