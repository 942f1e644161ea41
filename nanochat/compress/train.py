"""refrag_finetune --mode compress: reconstruction, continuation, questions, then the policies, in one Loop.

    compress_main(load_config(CompressConfig, argv), open_contexts)        # tasks/compress.py has open_contexts

Writes refrag_checkpoints/<out_tag>: the model loads like any other by `load_model("refrag", ...)` and is a
RAG model where all chunks are expanded; `load_reader` loads encoder and policies, too. Each stage has an optimizer.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn as nn

from nanochat.checkpoint import checkpoint_meta, list_steps, load_model, tag_of
from nanochat.compress import evaluate as evaluation
from nanochat.compress.chunks import Prompt
from nanochat.compress.reader import Reader, document_prompt
from nanochat.compress.stages import Stream, distil, of_size, reconstruct, reinforce, spread, supervise
from nanochat.config import UserError, changed_keys
from nanochat.device import single_device
from nanochat.finetune_config import inherit
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW, check_training, role_rates
from nanochat.plots import plot_metrics
from nanochat.report import log_stage
from nanochat.rl import mix_seed
from nanochat.run import Run
from nanochat.tokenizer import Tokenizer
from nanochat.train import Loop, memory_advice

STAGES = ("reconstruction", "continuation", "questions", "supervise", "reinforce")


@dataclass(frozen=True)
class CompressConfig:
    """Teach a RAG model to read documents as vectors. Sizes are counts, lengths are tokens."""

    SHORT: ClassVar = {"i": "source", "g": "model_tag", "s": "step"}

    mode: Annotated[Literal["compress"], "this one"] = "compress"
    # where from, what on
    source: Annotated[str, "-i: stage to start from"] = "rag"
    model_tag: Annotated[str | None, "-g: checkpoint to start from; none = the one saved last"] = None
    step: Annotated[int | None, "-s: step to start from; none = the newest"] = None
    knowledge_base: Annotated[str, "folder made by prepare_rag_dataset"] = ""
    retriever_type: Annotated[str | None, "finds distractors; none = the knowledge base's own"] = None
    top_k: Annotated[int, "documents of a question, as many of them as fit the model's context as tokens"] = 12
    max_doc_length: Annotated[int, "tokens of a document, title and number included"] = 128
    absent_share: Annotated[float, "of answerable questions in training: those without their documents"] = 0.15
    rename: Annotated[bool, "exchange the invented names of a world for each other in every question's context"] = True
    out_tag: Annotated[str, "folder of the result; empty = model_tag and _compress"] = ""
    # the compression
    chunk_tokens: Annotated[int, "tokens of a chunk at most, k: whole sentences"] = 32
    encoder_layers: Annotated[int, "blocks of the chunk encoder, from the model's bottom; 0 = a sixth, at least 1"] = 0
    # the stages; 0 steps = without
    reconstruction_steps: Annotated[int, "encoder alone: chunks back to tokens, by curriculum"] = 120
    continuation_steps: Annotated[int, "encoder and model: what follows after compressed chunks"] = 0
    question_steps: Annotated[int, "encoder and model: questions over mixed contexts"] = 300
    supervise_steps: Annotated[int, "policy: learns policy_labels"] = 400
    reinforce_steps: Annotated[int, "policy: reinforcement, from where supervise left it"] = 80
    # sizes of a step
    reconstruction_chunks: Annotated[int, "chunks of a step of reconstruction or continuation"] = 64
    largest_chunks: Annotated[int, "chunks of one sample at the curriculum's end"] = 8
    questions_per_step: Annotated[int, "of question_steps"] = 16
    policy_questions: Annotated[int, "of a step of supervise or reinforce"] = 16
    num_samples: Annotated[int, "choices of each question: the group of reinforce"] = 8
    device_batch_size: Annotated[int, "rows of a forward without gradients"] = 64
    # objective
    kd_weight: Annotated[float, "of the divergence from the model that reads all tokens; 0 = none"] = 1.0
    policy_labels: Annotated[
        Literal["gold", "utility"],
        "chunks with evidence, or how much likelier each chunk alone makes the answer (slow)",
    ] = "gold"
    gold_share: Annotated[float, "of training questions whose evidence always stays tokens"] = 0.6
    expand: Annotated[list | None, "shares of chunks that stay tokens, to train the policy on and to evaluate"] = None
    entropy_weight: Annotated[float, "of the policy's entropy in reinforce"] = 0.01
    normalize_std: Annotated[bool, "divide advantages by the group's standard deviation, as GRPO does"] = False
    # the optimizer
    embedding_lr: Annotated[float | None, "AdamW, embeddings; none = as the checkpoint was trained"] = None
    unembedding_lr: Annotated[float | None, "AdamW, head; alike"] = None
    scalar_lr: Annotated[float | None, "AdamW, scalars and gates; alike"] = None
    ssm_lr: Annotated[float | None, "AdamW, what steers a recurrence; alike"] = None
    matrix_lr: Annotated[float | None, "Muon, matrices; alike"] = None
    encoder_lr_frac: Annotated[float, "reconstruction: all rates start at this share of the above"] = 1.0
    init_lr_frac: Annotated[float, "continuation and questions: alike"] = 0.3
    policy_lr: Annotated[float, "AdamW, the policy"] = 1e-3
    rl_lr_frac: Annotated[float, "reinforce: policy_lr starts at this share of it"] = 0.1
    grad_clip: Annotated[float, "largest gradient norm; 0 = no clipping"] = 1.0
    # evaluation and output
    eval_questions: Annotated[int, "validation questions, answered under each policy; 0 = no evaluation"] = 128
    save_every: Annotated[int, "steps between checkpoints; 0 = only at the end, -1 = never"] = 0
    keep_last: Annotated[int, "checkpoints kept"] = 2
    log_every: Annotated[int, "steps between printed lines"] = 10
    resume: Annotated[bool, "go on from the newest whole checkpoint"] = False
    run: Annotated[str, "name of the run for the tracker; dummy = no tracking"] = "dummy"
    track: Annotated[Literal["none", "wandb", "trackio"], "tracker"] = "none"
    # the machine
    device: Annotated[str, "cpu, cuda, mps; empty = the best there is"] = ""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "multiplication dtype"] = "auto"
    kernels: Annotated[Literal["auto", "fast", "reference"], "which implementations run"] = "auto"
    seed: Annotated[int, "of samples, contexts and choices"] = 45

    def __post_init__(self) -> None:
        check_training(self)
        if min(self.reconstruction_chunks, self.largest_chunks, self.device_batch_size) < 1:
            raise ValueError(
                f"reconstruction_chunks={self.reconstruction_chunks}, largest_chunks={self.largest_chunks}, "
                f"device_batch_size={self.device_batch_size}: give 1 or more"
            )
        if self.chunk_tokens < 2 or min(self.top_k, self.questions_per_step, self.policy_questions) < 1:
            raise ValueError(
                f"chunk_tokens={self.chunk_tokens}, top_k={self.top_k}, questions_per_step={self.questions_per_step}, "
                f"policy_questions={self.policy_questions}: expected at least 2, 1, 1, 1"
            )
        if self.num_samples < 2:
            raise ValueError(f"num_samples={self.num_samples}: a group needs at least 2 choices to compare")
        if not self.shares or not all(0 < p < 1 for p in self.shares):
            raise ValueError(f"expand={self.expand}: expected shares between 0 and 1, as 0.1,0.25")

    @property
    def shares(self) -> tuple[float, ...]:
        return (0.05, 0.1, 0.25) if self.expand is None else tuple(map(float, self.expand))

    @property
    def plan(self) -> list[tuple[str, int]]:
        """(stage, steps), without stages of no steps."""
        steps = (self.reconstruction_steps, self.continuation_steps, self.question_steps, self.supervise_steps,
                 self.reinforce_steps)  # fmt: skip
        return [(name, n) for name, n in zip(STAGES, steps, strict=True) if n > 0]


@dataclass(frozen=True)
class Contexts:
    """What the stages train and are judged on. Conversations as tasks/rag.py makes them."""

    train: Any  # len, and conversation i
    val: Any
    texts: Sequence[tuple[str, str]]  # (title, text) of documents, none of them shown in val
    judge: evaluation.Judge
    kb: Any = None  # the knowledge base they come from


Opener = Callable[[CompressConfig, Tokenizer, int], Contexts]  # the int: most tokens of a conversation


@dataclass
class Stage:
    """One stage of a run: where it begins and what it trains."""

    name: str
    first: int
    steps: int


def stage_at(cfg: CompressConfig, step: int) -> Stage:
    """The stage that update number `step` belongs to; the last one at the end."""
    first = 0
    for name, steps in cfg.plan:
        if step < first + steps or (name, steps) == cfg.plan[-1]:
            return Stage(name, first, steps)
        first += steps
    raise UserError("no stage has steps: give --question_steps or another")


def compress_main(cfg: CompressConfig, open_contexts: Opener) -> None:
    """Train all stages, evaluate, write the report's section."""
    cfg, run, reader, meta = start(cfg)
    data = open_contexts(cfg, reader.tokenizer, reader.model.config.seq_len + 1)
    trainer = Trainer(cfg, reader, data)
    run.print(trainer.told())
    newest = max(list_steps(run.dir), default=0) if cfg.resume else 0
    stage = stage_at(cfg, max(0, newest - 1))  # whose optimizer was saved
    loop = Loop(
        run, reader.model, trainer.optimizer(stage.name), num_iterations=sum(n for _, n in cfg.plan),
        grad_clip=cfg.grad_clip, schedule=(0.04, 0.5, 0.05), log_every=cfg.log_every, keep_last=cfg.keep_last,
        meta=meta,
    )  # fmt: skip
    if state := loop.begin(cfg.resume):
        reader.load_state(state)
    with memory_advice(cfg.device_batch_size, reader.model.config.seq_len):
        for step in loop:
            if step.due(cfg.save_every) and not step.first:
                loop.save(reader.state())
            if step.last:
                break
            if stage.first != stage_at(cfg, step.number).first:
                stage = stage_at(cfg, step.number)
                loop.optimizer = trainer.optimizer(stage.name)
            if step.number == stage.first:
                run.print(f"stage: {stage.name}, {stage.steps} steps")
            progress = (step.number - stage.first) / stage.steps
            for _ in loop.forwards():
                loss, n, figures = trainer.loss(stage.name, step.number, progress)
                loop.backward(loss, n)
            loop.update(progress)
            run.record({"step": loop.step, "stage": STAGES.index(stage.name), **figures})
    finish(cfg, run, reader, data, loop, trainer.val)


def start(cfg: CompressConfig) -> tuple[CompressConfig, Run, Reader, dict[str, Any]]:
    """-> (cfg with nothing left open, run, a reader with a fresh encoder, meta of the checkpoints to come)."""
    device = single_device(cfg.device, "compress")
    model, tokenizer, meta = load_model(
        cfg.source, device, cfg.model_tag, cfg.step, dtype=cfg.dtype, kernels=cfg.kernels
    )
    tag = cfg.model_tag or tag_of(meta)
    cfg = dataclasses.replace(cfg, **inherit(cfg, meta["train_config"]), model_tag=tag, step=meta["step"])
    run = Run.start("refrag", cfg.out_tag or f"{tag}_compress", cfg)
    reader = Reader.new(model, tokenizer, cfg.chunk_tokens, cfg.encoder_layers, cfg.seed)
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, reader.encoder, reader.policies["rl"])]
    run.print(
        f"start: {cfg.source} {tag}, step {cfg.step}: {sizes[0]:.2f}M parameters; chunks of {reader.k} tokens, encoder "
        f"of {len(reader.encoder.body.layers)} blocks {sizes[1]:.2f}M, policy {sizes[2]:.2f}M"
    )
    return cfg, run, reader, checkpoint_meta(model, tokenizer, cfg, (cfg.source, tag, meta["step"]))


@dataclass
class Trainer:
    """What a step of each stage needs. Step n draws from its own stream (seed, n), so a resumed run goes on alike."""

    cfg: CompressConfig
    reader: Reader
    data: Contexts
    teacher: GPT = field(init=False)  # the model as it came, which reads all tokens
    stream: Stream = field(init=False)
    val: list[Prompt] = field(init=False)

    def __post_init__(self) -> None:
        tokenizer, conversations = self.reader.tokenizer, self.data.val
        self.teacher = copy.deepcopy(self.reader.model).eval().requires_grad_(False)
        texts = [document_prompt(self.reader, title, text) for title, text in self.data.texts]
        chunks = [p.chunk_ids(i) for p in texts for i in range(len(p.chunks))]
        self.stream = Stream(chunks, tokenizer.bos_id, tokenizer.encode_special("<|doc|>"))
        n = min(self.cfg.eval_questions, len(conversations))
        self.val = [self.reader.prompt(conversations[i]) for i in range(n)]
        if not chunks and self.cfg.reconstruction_steps + self.cfg.continuation_steps:
            raise UserError("no text to reconstruct: the knowledge base holds only documents of validation questions")

    def told(self) -> str:
        sizes = [len(c) for c in self.stream.chunks] or [0]
        shown = [len(p.chunks) for p in self.val] or [0]
        return (f"contexts: {len(self.data.train)} to train on; {len(sizes)} chunks of {np.mean(sizes):.1f} tokens to "
                f"reconstruct; {np.mean(shown):.1f} chunks and {np.mean([p.n_prompt for p in self.val] or [0]):.0f} "
                f"tokens in a validation prompt")  # fmt: skip

    def optimizer(self, stage: str) -> MuonAdamW:
        """A new one for what the stage trains; nothing else asks for gradients."""
        cfg, reader = self.cfg, self.reader
        for module in (reader.model, reader.encoder, *reader.policies.values()):
            module.requires_grad_(False)
        frac = cfg.encoder_lr_frac if stage == "reconstruction" else cfg.init_lr_frac
        lrs = role_rates(cfg, reader.model.config.d_model, frac)
        modules: dict[str, nn.Module] = {"encoder": reader.encoder}
        groups = reader.encoder.param_groups()
        if stage in ("continuation", "questions"):
            modules["model"] = reader.model
            groups = {role: groups[role] + params for role, params in reader.model.param_groups().items()}
        if stage in ("supervise", "reinforce"):
            name = "supervised" if stage == "supervise" else "rl"
            modules = {name: reader.policies[name]}
            lr = cfg.policy_lr * (cfg.rl_lr_frac if stage == "reinforce" else 1.0)
            groups, lrs = {"matrix": [], "scalar": list(modules[name].parameters())}, {"scalar": lr}
            if stage == "reinforce" and cfg.supervise_steps:
                reader.policies["rl"].load_state_dict(reader.policies["supervised"].state_dict())
        for module in modules.values():
            module.requires_grad_(True)
        return MuonAdamW(nn.ModuleDict(modules), groups, lrs, dtype=reader.model.compute_dtype)

    def loss(self, stage: str, step: int, progress: float) -> tuple[torch.Tensor, int, dict[str, Any]]:
        """-> (summed loss, how many it sums over, figures for the metrics)."""
        cfg, reader, rng = self.cfg, self.reader, np.random.default_rng([self.cfg.seed, step])
        if stage == "reconstruction":
            return *reconstruct(reader, self.samples(rng, progress, self.stream.reconstruction)), {}
        if stage == "continuation":
            prompts = self.samples(rng, progress, self.stream.continuation)
            return *distil(reader, self.teacher, prompts, [spread(rng, p, 0) for p in prompts], cfg.kd_weight), {}
        if stage == "questions":
            prompts = self.questions(rng, cfg.questions_per_step, answerable=False)
            expanded = [spread(rng, p, cfg.gold_share) for p in prompts]
            return *distil(reader, self.teacher, prompts, expanded, cfg.kd_weight), {}
        prompts = self.questions(rng, cfg.policy_questions, answerable=True)
        if stage == "supervise":
            return supervise(reader, reader.policies["supervised"], prompts, cfg.policy_labels, cfg.device_batch_size)
        generator = torch.Generator().manual_seed(mix_seed(cfg.seed, step))
        return reinforce(reader, reader.policies["rl"], prompts, float(rng.choice(cfg.shares)), cfg.num_samples,
                         generator, cfg.device_batch_size, cfg.entropy_weight, cfg.normalize_std)  # fmt: skip

    def samples(self, rng: np.random.Generator, progress: float, make: Callable[..., Prompt]) -> list[Prompt]:
        """As many samples of the curriculum as make up reconstruction_chunks."""
        prompts, n = list[Prompt](), 0
        while n < self.cfg.reconstruction_chunks:
            j = of_size(rng, progress, self.cfg.largest_chunks)
            prompts.append(make(rng, j))
            n += j
        return prompts

    def questions(self, rng: np.random.Generator, n: int, answerable: bool) -> list[Prompt]:
        """n training questions; with `answerable`, those whose documents hold the answer."""
        prompts = list[Prompt]()
        for _ in range(50 * n):
            conversation = self.data.train[int(rng.integers(len(self.data.train)))]
            if conversation["gold"] or not answerable:
                prompts.append(self.reader.prompt(conversation))
            if len(prompts) == n:
                return prompts
        raise UserError("hardly any training question has its documents in the context: raise --max_doc_length")


def finish(cfg: CompressConfig, run: Run, reader: Reader, data: Contexts, loop: Loop, val: list[Prompt]) -> None:
    """Evaluate every policy, tell, report."""
    metrics = {
        "model_tag": run.model_tag,
        "source": f"{cfg.source}, step {cfg.step}",
        "stages": ", ".join(f"{name} {n}" for name, n in cfg.plan),
        "questions": len(val),
        "tokens of a chunk, at most": cfg.chunk_tokens,
        "train loss (smoothed)": loop.smooth_loss,
        "minutes": loop.seconds / 60,
        "config": changed_keys(cfg),
    }
    text, plots = "", plot_metrics(run.metrics_path)
    if val:
        _, found, text, plot = evaluation.judge_policies(reader, val, data.judge, cfg.shares, run.model_tag, cfg.seed)
        run.print(text)
        metrics, plots = metrics | found, [*plots, plot]
    log_stage("refrag_compress", metrics, text=text, plots=plots)
    run.close()
