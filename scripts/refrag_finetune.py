"""Teach a RAG model to search step by step (--mode multihop), or to read documents as vectors (--mode compress).

    python -m scripts.prepare_rag_dataset --mode world --output rag_data --kinds=1hop,2hop,3hop,missing
    python -m scripts.rag_finetune --knowledge_base rag_data
    python -m scripts.refrag_finetune --knowledge_base rag_data
    python -m scripts.refrag_finetune --mode compress --knowledge_base rag_data     # nanochat/compress
    torchrun --nproc_per_node=8 -m scripts.refrag_finetune configs/refrag_hybrid_d20.py --knowledge_base DIR

Multihop has two stages. The cold start imitates searches of an oracle, answered by the real retriever
(tasks/multihop.py), and writes refrag_checkpoints/<tag>_cold. Reinforcement learning then samples searches and answers
from the model and rewards the right ones (nanochat/multihop_rl.py), on train.jsonl, and writes
refrag_checkpoints/<tag>; retrieved documents are no targets. --use_rewards=False ends after the cold start, which is
<tag> then. --resume goes on with either.
"""

import copy
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from nanochat.checkpoint import checkpoint_dir, checkpoint_meta, list_steps, load_checkpoint, load_model
from nanochat.common import run_script
from nanochat.config import UserError, changed_keys, load_config
from nanochat.finetune import Start, finish, make_loop, open_batches, start_from, val_rows, validate
from nanochat.finetune_config import FinetuneConfig, inherit
from nanochat.gpt import GPT
from nanochat.multihop_eval import ceiling, difference_table, em_table, search_and_answer, search_table, traces
from nanochat.multihop_rl import (
    COST_FROM,
    FIGURES,
    Cost,
    Curriculum,
    HopOrder,
    Level,
    describe,
    gold_ids,
    make_actor,
    make_judge,
    make_tool,
    parse_levels,
)
from nanochat.rag import MAX_DOC_LENGTH
from nanochat.report import log_stage
from nanochat.retrieval import KnowledgeBase
from nanochat.rl import Actor, Algorithm, Batch, collect, evaluate, mix_seed, remember
from nanochat.rl_health import Health
from nanochat.rl_stage import EVAL_SEED, RLKeys, Stage
from nanochat.run import Run
from nanochat.tokenizer import Tokenizer
from nanochat.tools import Tool
from nanochat.train import Loop, compile_model, make_optimizer, memory_advice
from nanochat.world_names import Dice
from tasks.mixtures import DEFAULT, MIXTURES, with_chat
from tasks.multihop import ColdStart, Elsewhere, Row, usable
from tasks.rag import dataset_folder, exchangeable, load_rows
from tasks.world_controls import Names

TRACES = 4  # in the report


@dataclass(frozen=True)
class MultihopConfig(FinetuneConfig, RLKeys):
    """Learn to search step by step; --mode=compress --help lists the keys of the other mode. Lengths are tokens."""

    SHORT: ClassVar = {**FinetuneConfig.SHORT, "chat_tasks": "tasks"}

    mode: Annotated[Literal["multihop", "compress"], "what is learnt"] = "multihop"
    source: Annotated[str, "stage to start from"] = "rag"
    # searching
    knowledge_base: Annotated[str, "folder made by prepare_rag_dataset, of questions with hops"] = ""
    retriever_type: Annotated[str | None, "simple, bm25, dense, hybrid, ...; none = the knowledge base's own"] = None
    max_hops: Annotated[int, "questions of more steps are left out"] = 3
    # 2026-11-21, BM25, whole articles of 1,000 entities: the oracle's queries all hit for 93, 79, 74 % of the questions
    # of 1, 2, 3 hops; with 2 documents for 97, 91, 85 %, but then 45 % of 3-hop trajectories pass 512 tokens
    top_k_per_hop: Annotated[int, "documents of a search"] = 1
    max_doc_length: Annotated[int, "tokens of a document, title and number included"] = MAX_DOC_LENGTH
    max_searches: Annotated[int, "searches of a question; 0 = max_hops + 1"] = 0
    # the cold start: num_iterations or num_epochs long
    cold_start: Annotated[bool, "begin with it; False: the checkpoint of --source can search already"] = True
    tasks: Annotated[list | None, "--chat_tasks: plain conversations (tasks/mixtures.py); none = embedded"] = None
    rename: Annotated[bool, "exchange the invented names of a world for each other in every trajectory of it"] = True
    chat_share: Annotated[float, "of the cold start's conversations: plain ones, without a search"] = 0.1
    num_epochs: Annotated[float, "times the cold start sees every trajectory, about"] = 4.0
    warmdown_ratio: Annotated[float, "share of the cold start over which rates fall"] = 0.5
    # reinforcement learning
    use_rewards: Annotated[bool, "reinforcement learning after the cold start"] = True
    max_iterations: Annotated[int, "its steps"] = 200
    algorithm: Annotated[Algorithm, "nanochat/rl.py says what each is"] = "reinforce"
    updates_per_rollout: Annotated[int, "steps that use the same samples; more than 1 needs --algorithm=dapo"] = 1
    reward: Annotated[Literal["em", "f1", "ternary"], "nanochat/multihop_rl.py says what each is worth"] = "em"
    search_cost: Annotated[float, "of each search beyond the steps needed, once 70 % of answers are right"] = 0.0
    curriculum: Annotated[list | None, "levels HOPS:DOCUMENTS:CORPUS, as 2:1:0.1,3:2; none = by hops alone"] = None
    unanswerable_share: Annotated[float, "of its questions, where there are some without an answer"] = 0.1
    advance_at: Annotated[float, "share of right answers from which on the next level begins"] = 0.8
    rl_lr_frac: Annotated[float, "all rates start at this share of the checkpoint's and fall to 0"] = 0.1
    rl_grad_clip: Annotated[float, "largest gradient norm; 0 = no clipping"] = 1.0
    num_samples: Annotated[int, "samples of an example: the group"] = 8
    max_new_tokens: Annotated[int, "ids after the question, documents included; the context ends them, too"] = 1024
    truncated: Annotated[Literal["zero", "mask"], "an answer that was cut: judged as bad, or left out"] = "mask"
    # evaluation, of both stages
    eval_every: Annotated[int, "steps between evaluations; 0 = only at start and end, -1 = never"] = 50
    eval_examples: Annotated[
        int, "questions of val.jsonl: num_samples answers each, and greedy ones before and after"
    ] = 64
    save_every: Annotated[int, "steps between checkpoints; 0 = only at the end, -1 = never"] = 50
    keep_last: Annotated[int, "checkpoints kept"] = 3
    seed: Annotated[int, "of the order of conversations and questions, and of sampling"] = 45

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rl()
        if (
            min(self.max_hops, self.top_k_per_hop, self.eval_examples, self.updates_per_rollout) < 1
            or self.max_searches < 0
        ):
            raise ValueError("max_hops, top_k_per_hop, eval_examples, updates_per_rollout: give 1 or more of each")
        for key in ("chat_share", "unanswerable_share"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: expected 0 or more and less than 1")
        if self.updates_per_rollout > 1 and self.algorithm != "dapo":
            raise ValueError(f"updates_per_rollout={self.updates_per_rollout} needs ratios: add --algorithm=dapo")
        if self.save_every > 0 and self.save_every % self.updates_per_rollout:
            raise ValueError(
                f"save_every={self.save_every} is no multiple of updates_per_rollout={self.updates_per_rollout}: "
                f"samples are not saved"
            )
        if not self.cold_start and not self.use_rewards:
            raise ValueError("cold_start=False and use_rewards=False leave nothing to do")
        if not self.cold_start and (not self.model_tag or (self.source == "refrag" and not self.out_tag)):
            raise ValueError(
                "cold_start=False: say from which --model_tag, and with --source=refrag to which --out_tag"
            )
        if self.use_rewards and (self.dry_run or self.save_every < 0):
            raise ValueError(
                "reinforcement starts from a saved cold start: --use_rewards=False for a run that saves none"
            )
        if self.use_rewards and self.max_iterations < 1:
            raise ValueError(f"max_iterations={self.max_iterations}: give 1 or more, or --use_rewards=False")
        parse_levels(self.curriculum, self.max_hops, self.top_k_per_hop)

    @property
    def searches(self) -> int:
        return self.max_searches or self.max_hops + 1


@dataclass(frozen=True)
class Data:
    """The questions and what is searched for them."""

    kb: KnowledgeBase
    train: list[Row]
    val: list[Row]
    invented: list[str]

    def tool(self, cfg: MultihopConfig, tokenizer: Tokenizer, level: Level | None = None, kb: Any = None) -> Tool:
        """The search tool, at the end of the curriculum or at a level of it. kb: another's names for this one's."""
        level = level or Level(cfg.max_hops, cfg.top_k_per_hop)
        return make_tool(
            tokenizer, self.kb if kb is None else kb, level.top_k, cfg.max_doc_length, cfg.searches, cfg.retriever_type,
            level.corpus, self.gold if level.corpus < 1 else (),
        )  # fmt: skip

    @cached_property
    def gold(self) -> frozenset[str]:
        """What the training questions rest on, which a smaller corpus keeps: each step of training has a tool."""
        return gold_ids(self.train)


def open_data(cfg: MultihopConfig) -> Data:
    if not cfg.knowledge_base:
        raise UserError("missing --knowledge_base=DIR: make one by `python -m scripts.prepare_rag_dataset`")
    folder = dataset_folder(cfg.knowledge_base)
    train, val = (usable(load_rows(folder / f"{split}.jsonl"), cfg.max_hops) for split in ("train", "val"))
    return Data(KnowledgeBase.open(folder / "knowledge_base"), train, val, exchangeable(folder) if cfg.rename else [])


# ---- stage 0 ----


def cold_start(cfg: MultihopConfig, data: Data) -> str:
    """Imitate the oracle's searches -> the tag of the checkpoint."""
    start = start_from(cfg, "refrag")
    tag = f"{start.run.model_tag}_cold" if cfg.use_rewards else start.run.model_tag
    start = dataclasses.replace(start, run=renamed(start.run, tag))
    if cfg.resume and finished(tag):
        start.run.print(f"cold start: finished before, {start.run.dir}")
        return tag
    train, val = (trajectories(cfg, start, data, split) for split in ("train", "val"))
    loop, rows = make_loop(start, train), val_rows(start, val)
    cursor = loop.begin(cfg.resume)
    forward = compile_model(start.model) if cfg.compile else start.model
    with open_batches(start, train, cursor) as batches, memory_advice(start.B, start.T):
        for step in loop:
            if step.due(cfg.eval_every) or (step.number == 0 and cfg.eval_every >= 0):
                validate(start, loop, rows)
            if step.due(cfg.save_every) and not step.first and not cfg.dry_run:
                loop.save(batches.place())
            if step.last:
                break
            for _ in loop.forwards():
                batch = next(batches)
                loss = forward(batch.x, batch.y, doc=batch.doc, loss_reduction="sum")
                loop.backward(loss, batch.tokens)
            loop.update()
    tasks = ["ColdStart", *cfg.names(MIXTURES, DEFAULT)]
    finish(start, loop, "refrag_cold_start", tasks, batches.place(), last=not cfg.use_rewards)
    return tag


def renamed(run: Run, tag: str) -> Run:
    return dataclasses.replace(run, model_tag=tag, dir=checkpoint_dir("refrag", tag))


def finished(tag: str) -> bool:
    """Whether the newest checkpoint of this tag is the last of its run."""
    folder = checkpoint_dir("refrag", tag)
    steps = list_steps(folder)
    meta = load_checkpoint(folder, max(steps), want=()).meta if steps else {}
    return bool(meta) and meta["step"] >= meta["num_iterations"]


def trajectories(cfg: MultihopConfig, start: Start, data: Data, split: Literal["train", "val"]) -> Any:
    """What the cold start reads, all retrieval done."""
    rows, invented = (data.train, data.invented) if split == "train" else (data.val, [])
    task = ColdStart(rows, data.tool(cfg, start.tokenizer), start.tokenizer, cfg.max_hops, start.T + 1, invented)
    start.run.print(f"{split}: {task}")
    return with_chat(task, split, cfg.names(MIXTURES, DEFAULT), cfg.chat_share)


# ---- stage 1 ----


@dataclass
class Learner:
    """The model that is reinforced, at a level of the curriculum."""

    cfg: MultihopConfig
    data: Data
    model: GPT
    tokenizer: Tokenizer
    order: HopOrder
    curriculum: Curriculum
    cost: Cost
    names: Names  # the ways to exchange those of the training questions

    def examiner(self, rows: Sequence[Row]) -> Actor:
        """Answers these rows, as hard as it gets."""
        return self._actor(rows, self.data.tool(self.cfg, self.tokenizer))

    def actor(self, seed: int) -> Actor:
        """Answers the training questions, at the level of the curriculum, in other names for each seed."""
        elsewhere = Elsewhere(self.data.train, self.data.kb, self.names.draw(Dice("reinforcement", seed)))
        return self._actor(
            elsewhere, self.data.tool(self.cfg, self.tokenizer, self.curriculum.level, elsewhere), self.cost
        )

    def _actor(self, rows: Sequence[Row], tool: Tool, cost: Cost | None = None) -> Actor:
        judge = make_judge(rows, self.tokenizer, tool, self.cfg.reward, self.cfg.truncated, cost)
        return make_actor(self.model, self.tokenizer, tool, rows, judge, self.cfg.sampling())

    def begin_level(self, run: Run) -> None:
        self.order.focus = self.curriculum.level.hops
        run.print(f"curriculum: {describe(self.curriculum.level)}; shares of hops (0: no answer) {self.order.shares()}")

    def moved(self, correct: float, progress: float) -> bool:
        """After a step -> whether another level begins."""
        moved = self.curriculum.update(correct, progress)
        self.cost.active = self.curriculum.right > COST_FROM
        return moved

    @property
    def position(self) -> dict[str, Any]:
        return {"order": self.order.position, "curriculum": self.curriculum.state}


def reinforce(cfg: MultihopConfig, data: Data, source: str, tag: str) -> None:
    """Reinforcement learning from the checkpoint `tag` of a stage."""
    cfg, loop, tokenizer = open_run(cfg, source, tag)
    run, size = loop.run, cfg.device_batch_size or 8
    run.print(
        f"reinforcement: {loop.num_iterations} steps of {cfg.examples_per_step} x {cfg.num_samples} samples from "
        f"{source} {tag}, {len(data.train)} questions, {cfg.algorithm}, reward {cfg.reward}, rates x {cfg.rl_lr_frac}"
    )
    learner, stage = begin(cfg, data, loop, tokenizer)
    held_out, n = data.val[: cfg.eval_examples], cfg.examples_per_rank(run.ranks.world_size)
    examiner = learner.examiner(held_out)
    learner.begin_level(run)
    sampled, batch = [], Batch.of([])
    with memory_advice(size, loop.model.config.seq_len):
        for step in loop:
            if step.due(cfg.eval_every) or (step.number == 0 and cfg.eval_every >= 0):
                stage.held_out(evaluate(examiner, len(held_out), EVAL_SEED, run.ranks))
            if stage.saves(step, cfg.save_every):
                stage.save(learner.position)
            if step.last or stage.ended:
                break
            health = Health(run.device, FIGURES)
            for _ in loop.forwards():
                if not len(batch) or step.number % cfg.updates_per_rollout == 0:
                    seed = mix_seed(cfg.seed, step.number, run.ranks.rank)
                    kept, sampled = collect(learner.actor(seed), learner.order, n, seed, cfg.resample)
                    batch = Batch.of(kept, run.device, cfg.algorithm)
                    if cfg.updates_per_rollout > 1:
                        batch = remember(loop.model, batch, size)
                health.add_groups(sampled)
                stage.backward(batch, size, health)
            figures = stage.update(health)
            if learner.moved(figures["correct"], loop.step / loop.num_iterations):
                learner.begin_level(run)
    if run.ranks.main:
        report(stage, learner, held_out)
    run.close()


def open_run(cfg: MultihopConfig, source: str, tag: str) -> tuple[MultihopConfig, Loop, Tokenizer]:
    """-> (cfg with the rates and sizes of the checkpoint, the loop, its tokenizer)."""
    run = Run.start("refrag", cfg.out_tag or cfg.model_tag or tag.removesuffix("_cold"), cfg)
    model, tokenizer, meta = load_model(source, run.device, tag, dtype=cfg.dtype, kernels=cfg.kernels)
    trained = meta["train_config"]
    size = cfg.device_batch_size or trained.get("device_batch_size")
    cfg = dataclasses.replace(cfg, **inherit(cfg, trained), device_batch_size=size, model_tag=run.model_tag)
    optimizer = make_optimizer(model, cfg, run.dtype, run.ranks, share=cfg.rl_lr_frac)
    loop = Loop(
        run, model, optimizer, num_iterations=cfg.max_iterations, grad_clip=cfg.rl_grad_clip, schedule=(0.0, 1.0, 0.0),
        log_every=cfg.log_every, keep_last=cfg.keep_last,
        meta=checkpoint_meta(model, tokenizer, cfg, (source, tag, meta["step"])),
    )  # fmt: skip
    return cfg, loop, tokenizer


def begin(cfg: MultihopConfig, data: Data, loop: Loop, tokenizer: Tokenizer) -> tuple[Learner, Stage]:
    """Where a run is, new or resumed."""
    reference = copy.deepcopy(loop.model).eval() if cfg.kl_coef else None
    stage = Stage(cfg, loop, loop.begin(cfg.resume), lambda: model_before(loop).state_dict(), reference)
    saved = stage.progress.position or {}
    order = HopOrder(data.train, cfg.seed, loop.run.ranks, saved.get("order"), cfg.unanswerable_share)
    curriculum = Curriculum(parse_levels(cfg.curriculum, cfg.max_hops, cfg.top_k_per_hop), cfg.advance_at)
    if saved:
        curriculum.state = saved["curriculum"]
    cost = Cost(cfg.search_cost, curriculum.right > COST_FROM)
    return Learner(cfg, data, loop.model, tokenizer, order, curriculum, cost, Names(data.invented)), stage


def model_before(loop: Loop) -> GPT:
    """The model the run started from."""
    start, dtype = loop.meta["source"], loop.meta["train_config"]["dtype"]
    return load_model(start["stage"], loop.run.device, start["model_tag"], start["step"], dtype=dtype)[0]


def report(stage: Stage, learner: Learner, held_out: Sequence[Row]) -> None:
    """The section of this stage: greedy answers of the cold start and now, by hops, health, traces, pictures."""
    cfg, tokenizer = learner.cfg, learner.tokenizer
    tool = learner.data.tool(cfg, tokenizer)
    models = {"refrag": stage.loop.model, "before": model_before(stage.loop)}
    runs = {
        name: [search_and_answer(model, tokenizer, tool, held_out, cfg.max_new_tokens, cfg.sample_batch_size)]
        for name, model in models.items()
    }
    tables = [em_table(runs, ceiling(tool, held_out)), difference_table(runs), search_table(runs), stage.pass_table()]
    text = "\n\n".join(["Held-out questions, greedy:", *tables, "Traces:", traces(runs["refrag"][0], TRACES)])
    stage.run.print(text)
    metrics = {
        "model_tag": stage.run.model_tag,
        "source": f"{cfg.source}, {stage.loop.meta['source']['model_tag']}",
        "algorithm": cfg.algorithm,
        "reward": cfg.reward,
        "last level": describe(learner.curriculum.level),
        **stage.metrics(),
        "config": changed_keys(cfg),
    }
    log_stage("refrag_training", metrics, text=text, plots=stage.plots())


def multihop_main(cfg: MultihopConfig) -> None:
    data = open_data(cfg)
    tag = cold_start(cfg, data) if cfg.cold_start else cfg.model_tag
    if cfg.use_rewards:
        reinforce(cfg, data, "refrag" if cfg.cold_start else cfg.source, tag)


def main(argv: list[str]) -> None:
    if re.search(r"(^| )--mode[= ]compress( |$)", " ".join(argv)):
        from nanochat.compress.train import CompressConfig, compress_main
        from tasks.compress import open_contexts

        compress_main(load_config(CompressConfig, argv), open_contexts)
    else:
        multihop_main(load_config(MultihopConfig, argv))


if __name__ == "__main__":
    run_script(main)
