"""Finding the parts of a causal LM by what they are, not by what one architecture calls them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def linear_size(module: nn.Module) -> int:
    """Returns the number of weights that one token multiplies in a linear layer, 0 for any other module."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features * module.out_features
    weight = module._parameters.get("weight")
    return weight.numel() if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding) else 0


def linear_weights(module: nn.Module, expert_share: float = 1.0) -> int:
    """Returns the weights that one token multiplies in all linear layers below `module`; stacked experts (3-d
    parameters) count by the share of them that a token visits."""
    total = 0
    for part in module.modules():
        if hasattr(part, "base_layer"):
            continue
        total += linear_size(part)
        total += sum(
            round(p.numel() * expert_share) for p in part._parameters.values() if p is not None and p.dim() == 3
        )
    return total


def find_blocks(model: nn.Module, count: int, path: str | None) -> tuple[nn.Module, str]:
    """Returns the module that holds the list of blocks, and the list's name in it."""
    if path is not None:
        parent_path, _, name = path.rpartition(".")
        try:
            parent = model.get_submodule(parent_path)
            found = parent._modules[name]
        except (AttributeError, KeyError):
            raise ValueError(
                f"`blocks`='{path}' is not a module of {type(model).__name__}; its children are "
                f"{[n for n, _ in model.named_children()]}"
            ) from None
        if not isinstance(found, nn.ModuleList) or len(found) != count:
            raise ValueError(
                f"`blocks`='{path}' is a {type(found).__name__}; a ModuleList of num_hidden_layers={count} "
                "blocks is needed"
            )
        return parent, name
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList) and len(layers) == count:
        return decoder, "layers"
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    fits = [name for name, m in lists if len(m) == count]
    if len(fits) != 1:
        raise ValueError(
            f"{type(model).__name__}: looked for `get_decoder().layers` and for the only ModuleList of "
            f"num_hidden_layers={count} blocks; found {[(name, len(m)) for name, m in lists] or 'no ModuleList'}. "
            "Name it by hand: ExitConfig(blocks='path.to.blocks')"
        )
    return find_blocks(model, count, fits[0])


def find_decoder(model: nn.Module, blocks: nn.ModuleList) -> nn.Module:
    """Returns the module that embeds, masks and runs the blocks: the largest one below the causal LM that holds
    them."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is not None and decoder is not model and any(m is blocks for m in decoder.modules()):
        return decoder
    for child in model.children():
        if any(m is blocks for m in child.modules()):
            return child
    raise ValueError(f"{type(model).__name__}: no child module holds the decoder blocks")


def find_head(model: nn.Module) -> nn.Module:
    """Returns the layer that makes logits of the normed state."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no output embeddings; a causal LM is needed: load it with AutoModelForCausalLM"
        )
    return head


def find_norm(decoder: nn.Module, blocks: nn.ModuleList, ids: Tensor) -> nn.Module:
    """Returns the module whose output is the decoder's last hidden state, on a batch of ids [1, tokens]."""
    outputs: list[tuple[nn.Module, Tensor]] = []
    inside = {id(m) for block in blocks for m in block.modules()}
    watched = [m for m in decoder.modules() if id(m) not in inside and m is not decoder and m is not blocks]
    handles = [m.register_forward_hook(lambda m, _, out: outputs.append((m, out))) for m in watched]
    try:
        last = decoder(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    for module, out in reversed(outputs):
        if isinstance(out, Tensor) and out.shape == last.shape and torch.equal(out, last):
            return module
    raise ValueError(
        f"{type(decoder).__name__}: no module gives its last hidden state (a final norm was looked for "
        f"among {sorted({type(m).__name__ for m in watched})})"
    )


def plain_copy(block: nn.Module) -> nn.Module:
    """Returns a copy of a block with PEFT's adapters, as far as they are in use, merged into its own layers and taken
    off.

    Raises:
        ValueError: its weights are quantized, so that a copy could not be trained.
    """
    block = copy.deepcopy(block)
    for name, module in list(block.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            # As its forward does: what is merged stays so until adapters are disabled, whichever is active.
            if module.merged == module.disable_adapters:
                (module.unmerge if module.merged else module.merge)()
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, module.base_layer)
    if frozen := [name for name, parameter in block.named_parameters() if not parameter.is_floating_point()]:
        raise ValueError(
            f"`head`: mlp and block heads are trained copies of the last blocks, and {frozen[0]} of those is "
            "quantized; choose head norm or linear for this backbone"
        )
    return block


def require_plain(model: nn.Module) -> None:
    """Refuses models that do more than their parts, or cannot be called.

    Raises:
        ValueError: a `PeftModel` that puts learned tokens in front of every text, or a configuration with which
            transformers' own models fail.
    """
    if getattr(model.config, "return_dict", True) is False:
        raise ValueError(
            "the backbone's config.return_dict is False, with which transformers' own models fail, as their parts then "
            "hand on tuples; set it to True"
        )
    configs = getattr(model, "peft_config", {}) if hasattr(model, "get_base_model") else {}
    for name, config in configs.items():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"the backbone's adapter '{name}' is a {type(config).__name__}: it puts learned tokens in front of "
                "every text, which exits would not see; give the backbone without it, or with an adapter of weights, "
                "such as LoRA"
            )


def require_batch_first(name: str, calls: list) -> None:
    """Refuses blocks called with a tensor that rows cannot be picked from.

    Args:
        name: of the model's class.
        calls: the blocks' arguments, recorded at batch 1.

    Raises:
        ValueError: one of these tensors does not begin with the batch.
    """
    odd: list[tuple] = []

    def note(value: Any) -> None:
        """Notes the shapes of tensors in a call, however deep, that do not begin with 1."""
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] != 1:
            odd.append(tuple(value.shape))
        elif isinstance(value, (tuple, list, dict)):
            for item in value.values() if isinstance(value, dict) else value:
                note(item)

    note(calls)
    if odd:
        raise ValueError(
            f"{name}: its blocks are called with a tensor {odd[0]} that does not begin with the batch, so rows cannot "
            "leave on their own; this architecture is not supported"
        )
