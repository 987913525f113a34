"""Adapters with random factors, for tests of what is done with them."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.models.identity import write_base_identity


def write_adapter(
    folder: Path, base: Path, model: Any = None, *, scale: float = 0.05, **settings: Any
) -> Path:
    """An adapter with random factors, as large as a short training makes them."""
    torch.manual_seed(3)
    model = model or AutoModelForCausalLM.from_pretrained(base)
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    adapted = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_().mul_(scale)
            elif "trainable_tokens" in name:
                weight.add_(torch.randn_like(weight) * scale)
    adapted.save_pretrained(folder)
    file = folder / "adapter_config.json"
    config_json = json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}
    file.write_text(json.dumps(config_json))
    write_base_identity(folder, str(base), adapted.config.to_dict())
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder
