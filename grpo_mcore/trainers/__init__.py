"""The training loops. A step reads as one page: its phases, in order."""

from grpo_mcore.trainers.dpo import DPOTrainer
from grpo_mcore.trainers.grpo import GRPOTrainer
from grpo_mcore.trainers.sft import SFTTrainer
from grpo_mcore.trainers.teacher_grpo import TeacherGRPOTrainer

__all__ = ["DPOTrainer", "GRPOTrainer", "SFTTrainer", "TeacherGRPOTrainer"]
