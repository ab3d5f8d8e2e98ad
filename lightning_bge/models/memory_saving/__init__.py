"""What reduces the memory that training needs: gradient checkpointing, frozen layers, LoRA."""
