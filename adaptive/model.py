"""`EarlyExitModel`: a Hugging Face causal LM with exits."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import ModelOutput

from adaptive import storage
from adaptive.backbone import SWAP, Backbone
from adaptive.calibration import Certificate
from adaptive.config import ExitConfig, LossConfig
from adaptive.costs import Costs
from adaptive.decoding import decode, with_stop_strings
from adaptive.exits import Exits
from adaptive.objective import gate_examples, joint_loss
from adaptive.policy import ExitPolicy
from adaptive.pretrained import resolve

MODES = ("frozen", "lora", "full")


@dataclass
class ExitOutput(ModelOutput):
    """What `forward` returns.

    Attributes:
        loss: joint loss (0-dim, nats per labelled position) if labels were given.
        logits: full-depth logits [batch, tokens, vocabulary] if no labels were given.
        metrics: per exit loss, agreement, gate error; detached 0-dim tensors by name.
        examples: what gates learn from, if asked for: states [N, exits, hidden] at the N labelled positions, and bool
            [N, exits], whether leaving there does no harm.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    metrics: dict[str, Tensor] | None = None
    examples: tuple[Tensor, Tensor] | None = None


class EarlyExitModel(nn.Module):
    """A backbone and its exits. The backbone is wrapped, not copied, and frozen until a mode that trains it is chosen.

    Args:
        backbone: a causal LM; a `PeftModel` or a quantized model is welcome.
        exit_config: depths, heads and gates.
        loss_config: what training minimises.

    Raises:
        ValueError: the backbone's parts cannot be found, or the configuration does not fit it.
    """

    def __init__(self, backbone: nn.Module, exit_config: ExitConfig, loss_config: LossConfig | None = None):
        super().__init__()
        self.backbone = backbone
        self.view = Backbone(backbone, exit_config.blocks)
        exit_config.validate(self.view.num_layers, self.view.vocab_size)
        self.exit_config, self.loss_config = exit_config, loss_config or LossConfig()
        self.exits = Exits(self.view, exit_config)
        self.depths = tuple(exit_config.depths)
        self.policy = ExitPolicy.full(len(self.depths))
        self.certificate: Certificate | None = None
        self.mode, self.step, self.seed = "frozen", 0, 0
        self.own_clock, self.steps = True, 1  # of the whole run; only the gradual curriculum asks
        self._teacher: list = []
        self.train_mode("frozen")

    @classmethod
    def from_backbone(
        cls, backbone: str | nn.Module, exit_config: ExitConfig, loss_config: LossConfig | None = None, **kwargs
    ) -> EarlyExitModel:
        """Returns a model with fresh exits.

        Args:
            backbone: a causal LM, or the id or folder of one.
            exit_config: depths, heads and gates.
            loss_config: what training minimises.
            **kwargs: for `AutoModelForCausalLM.from_pretrained` (dtype, device_map, quantization_config, revision,
            ...).
        """
        if isinstance(backbone, (str, Path)):
            name = str(backbone)
            backbone = AutoModelForCausalLM.from_pretrained(resolve(name), **kwargs)
            backbone.name_or_path = name
        elif kwargs:
            raise ValueError(f"{sorted(kwargs)} only go with a model id; the backbone given is loaded already")
        return cls(backbone, exit_config, loss_config).eval()

    @property
    def config(self):
        """The backbone's configuration."""
        return self.backbone.config

    @property
    def generation_config(self) -> GenerationConfig:
        """The backbone's generation defaults."""
        return self.view.inner.generation_config

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.view.inner.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the backbone's norms and heads."""
        return self.view.norm_dtype

    @property
    def _no_split_modules(self) -> list[str]:
        # FSDP wraps these; without the name it would wrap no block and say nothing.
        return [type(self.view.blocks[0]).__name__]

    @property
    def num_exits(self) -> int:
        """Number of exits, the full depth not counted."""
        return len(self.depths)

    @property
    def costs(self) -> Costs:
        """Prices traces of this model, in FLOPs and bytes."""
        view = self.view
        shape = {
            "layers": view.num_layers,
            "hidden": view.hidden_size,
            "vocab": view.vocab_size * view.hidden_size,
            "bytes_per_weight": self.dtype.itemsize,
            "blocks": [view.block_shape(i) for i in range(view.num_layers)],
        }
        return Costs(shape, self.exits.shapes(view, self.depths))

    def train_mode(self, mode: str) -> None:
        """Chooses who learns: "frozen" (exits only), "lora" (the adapter of a `PeftModel` too; the teacher is the same
        backbone with adapters off) or "full" (the whole backbone; the teacher is a frozen copy made now).

        Raises:
            ValueError: an unknown mode, or "lora" on a backbone without an adapter.
        """
        if mode not in MODES:
            raise ValueError(f"`mode`={mode!r} is not one of {', '.join(MODES)}; choose one")
        if mode == "lora" and not hasattr(self.backbone, "disable_adapter"):
            raise ValueError("`mode`='lora' needs a PeftModel as backbone; wrap it with peft.get_peft_model first")
        if self.view.model is not self.backbone:  # an adapter was put around it since
            self.view = Backbone(self.backbone, self.exit_config.blocks)
        self.mode, self._teacher = mode, []
        if mode == "full":
            teacher = copy.deepcopy(self.backbone).eval().requires_grad_(False)
            self._teacher = [
                Backbone(teacher, self.exit_config.blocks)
            ]  # in a list: not a child, not saved, not trained
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(
                parameter.is_floating_point() and (mode == "full" or mode == "lora" and "lora_" in name)
            )

    @property
    def teacher_view(self) -> Backbone:
        """The model that exits learn from: the backbone itself, or its frozen copy in mode "full"."""
        return self._teacher[0] if self._teacher else self.view

    @torch.no_grad()
    def teacher_states(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Returns the teacher's normed full-depth states [batch, tokens, hidden]."""
        view, training = self.teacher_view, self.view.inner.training
        off = self.backbone.disable_adapter() if self.mode == "lora" else contextlib.nullcontext()
        view.inner.eval()
        with off:
            positions = None if attention_mask is None else (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
            hidden, calls = view.start(input_ids, attention_mask, positions, None)
            normed = view.norm(view.run(hidden, calls, 0, view.num_layers))
        view.inner.train(training)
        return normed

    def train(self, mode: bool = True) -> EarlyExitModel:
        """Sets training mode; a frozen backbone stays in eval mode, so that no dropout disturbs the teacher."""
        super().train(mode)
        if self.mode == "frozen":
            self.backbone.eval()
        return self

    def exit_parameters(self) -> list[nn.Parameter]:
        """Returns the trainable parameters of the heads."""
        return [p for p in self.exits.heads.parameters() if p.requires_grad]

    def gate_parameters(self) -> list[nn.Parameter]:
        """Returns the trainable parameters of the gates."""
        return [p for p in self.exits.gates.parameters() if p.requires_grad]

    def modules_from(self, depth: int) -> list[str]:
        """Returns the names, within the backbone, of all modules in the blocks from `depth` on."""
        inside = set(self.view.blocks[depth:].modules())
        return [name for name, module in self.backbone.named_modules() if module in inside]

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Returns the trainable parameters of the backbone; none in mode "frozen"."""
        return [p for p in self.backbone.parameters() if p.requires_grad]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        states: Tensor | None = None,
        top: Tensor | None = None,
        examples: bool = False,
        **kwargs,
    ) -> ExitOutput:
        """Returns the joint loss and metrics (or examples for gates) if labels are given, else full-depth logits.

        Args:
            input_ids: [batch, tokens].
            attention_mask: [batch, tokens], 0 on padding.
            labels: [batch, tokens] as in transformers: shifted inside, -100 where nothing is wanted.
            num_items_in_batch: labelled tokens in the whole optimizer step, over which the loss is taken.
            states, top: of these rows, from `states.with_states`; the frozen backbone then does not run for the loss.
            examples: return what gates learn from, not the loss.
            **kwargs: passed to the backbone when there are no labels.
        """
        if labels is None:
            with SWAP:  # another thread may be generating
                out = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            return ExitOutput(logits=out.logits)
        self.view.refresh()
        if examples:
            return ExitOutput(examples=gate_examples(self, input_ids, attention_mask, labels, states, top))
        loss, metrics = joint_loss(self, input_ids, attention_mask, labels, num_items_in_batch, states, top)
        if self.training and self.own_clock:
            self.step += 1  # another loop than train/exits.py: what is drawn at random must change all the same
        return ExitOutput(loss=loss, metrics=metrics)

    def generate(
        self,
        *args,
        policy: ExitPolicy | Sequence[float] | Sequence[ExitPolicy] | None = None,
        kv: str = "propagate",
        probe: bool = False,
        seed: int | Sequence[int] | None = None,
        streamer=None,
        **kwargs,
    ):
        """Returns what `generate` of transformers returns, with `.trace` added to the output object.

        Args:
            *args: as in transformers.
            policy: who leaves where; thresholds, one per exit, will do. The certificate's if None, else full depth. Or
                a list with an `ExitPolicy` for each row: rows with the same prompt are run as one until they part.
            kv: what becomes of the blocks beyond an exit. "propagate": their K/V come from the state that the token
                left with. "recompute": it goes on in one batch with the next token that does, another row's or, after
                waiting, its own row's; K/V are then those of a full pass. "verify": it waits, and the full model judges
                what was said early: greedy answers are those of full depth, sampled ones follow its distribution. A
                certificate is of "propagate".
            probe: generate at full depth and record what every exit would have said (`Trace.regret`).
            seed: row r samples with a generator of its own seeded with seed + r, or seed[r] if these are several. None
                draws one from torch's generator.
            streamer: as in transformers.
            **kwargs: as in transformers; `cache_implementation="static"` asks for CUDA graphs, where there are any.
                Processors and criteria of your own must keep no state: they may be asked for what is not said.

        Raises:
            ValueError: thresholds that do not fit the exits, an unknown `kv`, beam search, too long a prompt.
        """
        policy = self.policy if policy is None else policy
        if kwargs.get("assistant_model") is not None:
            raise ValueError("generate: `assistant_model` does not go with exits, which draft themselves: kv='verify'")
        if not isinstance(policy, ExitPolicy):
            given = list(policy) if isinstance(policy, Iterable) else []
            kinds = {isinstance(each, ExitPolicy) for each in given}
            if len(kinds) != 1:
                raise ValueError(
                    f"`policy`={policy!r}; give an ExitPolicy, an ExitPolicy for each row, or a threshold for each exit"
                )
            policy = given if kinds == {True} else ExitPolicy(tuple(given))
        for each in [policy] if isinstance(policy, ExitPolicy) else policy:
            if len(each.thresholds) != self.num_exits:
                raise ValueError(
                    f"the policy has {len(each.thresholds)} thresholds, the model {self.num_exits} exits (depths "
                    f"{list(self.depths)}); give one per exit"
                )
        loop = partial(decode, model=self, policy=policy, kv=kv, probe=probe, seed=seed, streamer=streamer)
        kwargs = with_stop_strings(kwargs, self.generation_config)
        return self.backbone.generate(*args, custom_generate=loop, streamer=streamer, **kwargs)

    def certify(self, certificate: Certificate) -> None:
        """Takes a certificate: its thresholds become the model's policy."""
        self.certificate, self.policy = certificate, ExitPolicy(tuple(certificate.thresholds))

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        """Recomputes the backbone's blocks in the backward pass instead of keeping their activations.

        Raises:
            ValueError: a block head reads the backbone's K/V, which a recomputed block does not keep.
        """
        if self.exits.shares_kv:
            raise ValueError(
                "gradient checkpointing keeps no K/V for `head_kv`='shared'; use head_kv 'own', or no checkpointing"
            )
        self.view.inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def save_pretrained(self, folder: str | Path, **kwargs) -> None:
        """Writes exits.safetensors, exit_config.json, certificate.json (if certified) and a model card; beside them the
        PEFT adapter, or the whole backbone if it was trained or came from no known place."""
        storage.save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: nn.Module | None = None, **kwargs) -> EarlyExitModel:
        """Returns a saved model.

        Args:
            folder: a folder written by `save_pretrained`, or a Hub repository of the same form.
            backbone: the loaded causal LM, where it should not be loaded from its recorded place.
            **kwargs: for loading the backbone (dtype, device_map, ...), and `revision` of the repository.

        Raises:
            ValueError: files that are missing, truncated, changed, or that do not fit the backbone.
        """
        return storage.load(cls, str(folder), backbone, kwargs)

    def export(self, folder: str | Path, precision: str = "int4", **kwargs) -> Path:
        """Writes a folder that generates without torch; see `adaptive.export.export`, which also takes **kwargs."""
        # Looked up when asked for: exporting stands above the model, and needs packages that a model does not.
        return import_module("adaptive.export").export(self, folder, precision, **kwargs)

    def to_draft(self, depth: int, folder: str | Path) -> Path:
        """Writes the blocks up to an exit as a plain checkpoint that drafts for the model; see `plain.to_draft`."""
        return import_module("adaptive.plain").to_draft(self, depth, folder)

    def merge(self, folder: str | Path) -> Path:
        """Writes the backbone, adapters merged, as a plain checkpoint; see `plain.merge`."""
        return import_module("adaptive.plain").merge(self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload early exits",
    ) -> str:
        """Uploads what `save_pretrained` writes and returns the commit's address."""
        return storage.push(self, repo_id, private=private, token=token, commit_message=commit_message)
