#!/usr/bin/env bash
# From an empty machine to a model that answers:  bash speedrun.sh
# Without a GPU: a tiny hybrid of Mamba and attention on text it makes itself, in some minutes. With GPUs: the depth-20
# recipe on FineWeb-EDU.
# Interrupted, it goes on where it stopped; finished, a second run only reports and samples again.
#
#   NANOCHAT_BASE_DIR=DIR   where data, tokenizer, checkpoints and report go (default ~/.cache/nanochat)
#   WANDB_RUN=NAME          track the run in wandb under this name (default dummy: no tracking)
#   DEPTH=N                 layers of the GPU recipe's model (default 20)
#   GPUS=N                  how many GPUs to use (default all of them; 0 = the CPU run)
#   FRESH=1                 begin again: forget which stages have finished, remove the model trained here
#   SPEEDRUN_PROCESSES=N    processes of RL and of evaluations in the CPU run, 1 or 2 (default 2 where there are two cores)
#   SPEEDRUN_TRAIN="--device_batch_size=16 ..."   more flags for base_train; SPEEDRUN_MID, _SFT and _RL are those of the
#                                                 stages after it
# Of the CPU run:
#   SPEEDRUN_RAG="...", SPEEDRUN_REFRAG="..."     more flags for its last two trainings
#   SPEEDRUN_PROBLEMS=N                           questions of each task that evaluations ask (default 400)
#   SPEEDRUN_RAG_PROBLEMS=N                       questions that are answered from documents (default 500), a fifth of
#                                                 them from each number of documents
#   SPEEDRUN_HOP_QUESTIONS=N                      questions to learn searching from (default 6000)
#   SPEEDRUN_HOP_PROBLEMS=N                       questions that are answered by searching step by step (default 100)
#   SPEEDRUN_VOCAB=N                              size of its vocabulary (default 4096)
#   SPEEDRUN_MAX_CHARS=N                          characters its tokenizer is trained on (default 20 million)
#   SPEEDRUN_ARCH_SECONDS=N                       training of each architecture that is compared (default 3)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/setup.sh"

export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
RUN="${WANDB_RUN:-dummy}"
STAMPS="$NANOCHAT_BASE_DIR/speedrun" # NAME.done holds what a finished stage ran, and what was run before it
DONE_SO_FAR=""

trap 'echo "speedrun: interrupted; bash speedrun.sh goes on where it stopped" >&2; exit 130' INT
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT # the download in the background

# stage NAME ARTIFACT COMMAND ...: run COMMAND, unless it has finished before: the same module with the same arguments and
# config files, after the same stages, and its ARTIFACT (a path in NANOCHAT_BASE_DIR, - for none) is still there. The name
# of the run and the number of GPUs may change. A COMMAND that ends in --resume may only find its own work to go on with.
stage() {
    local name=$1 artifact=$2 start=$SECONDS word
    shift 2
    word="$*"
    word="${word#* -m }"
    word="${word#nanochat.launch ? }"
    word="${word#-- }"
    DONE_SO_FAR+="$name: ${word//"--run=$RUN "/}"$'\n'
    for word in "$@"; do
        if [[ $word == *.py ]]; then DONE_SO_FAR+="$(cat "$word")"$'\n'; fi
    done
    if same "$name.done" && made "$artifact"; then
        echo "== $name: finished before"
        return
    fi
    if [ "${!#}" = --resume ] && made "$artifact" && ! same "$name.begun"; then
        echo "speedrun: $NANOCHAT_BASE_DIR/$artifact is of another run or other settings: FRESH=1 bash speedrun.sh removes" \
            "it and begins again; another NANOCHAT_BASE_DIR keeps it" >&2
        exit 1
    fi
    echo "== $name: $*"
    stamp "$name.begun"
    "$@"
    stamp "$name.done"
    echo "== $name: $((SECONDS - start)) s"
}

made() { [ "$1" = - ] || [ -e "$NANOCHAT_BASE_DIR/$1" ]; }

same() { [ "$(cat "$STAMPS/$1" 2>/dev/null)"$'\n' = "$DONE_SO_FAR" ]; }

stamp() {
    printf %s "$DONE_SO_FAR" >"$STAMPS/$1.tmp"
    mv "$STAMPS/$1.tmp" "$STAMPS/$1"
}

count_gpus() {
    local seen listed
    seen=$(python -c 'import torch; print(torch.cuda.device_count())')
    listed=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    if [ "$seen" = 0 ] && [ "$listed" != 0 ] && [ "${CUDA_VISIBLE_DEVICES-unset}" = unset ]; then
        echo "speedrun: nvidia-smi lists $listed GPUs but torch sees none: update the driver, or GPUS=0 bash speedrun.sh for the CPU run" >&2
        exit 1
    fi
    echo "$seen"
}

cpu_run() {
    # what writes texts step by step does more in two processes of one thread than in one of two
    local -a ranks=(python -m nanochat.launch "${SPEEDRUN_PROCESSES:-$(python -c 'import os; print(min(2, os.cpu_count() or 1))')}")
    stage dataset base_data python -m nanochat.dataset
    stage tok_train tokenizer python -m scripts.tok_train --vocab_size="${SPEEDRUN_VOCAB:-4096}" --max_chars="${SPEEDRUN_MAX_CHARS:-20000000}"
    stage tok_eval - python -m scripts.tok_eval
    local -a flags mid sft rag refrag rl
    # answers are sampled, as one who chats would and as reinforcement learning is rewarded
    local chat=(--model_tag="$TAG" --max_problems="${SPEEDRUN_PROBLEMS:-400}" --max_new_tokens=32 --num_samples=2
        --temperature=1 --top_k=0 --show=1)
    read -ra flags <<<"${SPEEDRUN_TRAIN:---num_iterations=190}"
    read -ra mid <<<"${SPEEDRUN_MID:---num_iterations=140 --eval_tokens=32768}"
    read -ra sft <<<"${SPEEDRUN_SFT:---num_iterations=60 --eval_tokens=32768}"
    read -ra rag <<<"${SPEEDRUN_RAG:---num_iterations=260 --warmdown_ratio=0.8 --eval_tokens=32768}"
    read -ra refrag <<<"${SPEEDRUN_REFRAG:---num_iterations=100 --max_iterations=4 --eval_tokens=32768}"
    read -ra rl <<<"${SPEEDRUN_RL:---num_iterations=30}"
    stage base_train "base_checkpoints/$TAG" python -m scripts.base_train configs/tiny_hybrid.py --attn_conv=4 \
        --run="$RUN" "${flags[@]}" --resume
    stage base_loss - python -m scripts.base_loss --model_tag="$TAG" --split_tokens=65536 --device_batch_size=8
    stage bench_arch - python -m scripts.bench_arch configs/tiny_{transformer,mamba,hybrid}.py --parts=train,length \
        --budget=seconds --amount="${SPEEDRUN_ARCH_SECONDS:-3}" --lrs=0.01 --seeds=1 --lengths=256,1024
    stage mid_train "mid_checkpoints/$TAG" python -m scripts.mid_train --model_tag="$TAG" --run="$RUN" --save_every=50 \
        "${mid[@]}" --resume
    stage chat_eval_mid - "${ranks[@]}" scripts.chat_eval -i mid "${chat[@]}"
    stage chat_sft "sft_checkpoints/$TAG" python -m scripts.chat_sft --model_tag="$TAG" --run="$RUN" "${sft[@]}" --resume
    stage chat_eval_sft - "${ranks[@]}" scripts.chat_eval -i sft "${chat[@]}"
    stage chat_rl "rl_checkpoints/$TAG" "${ranks[@]}" scripts.chat_rl --model_tag="$TAG" --run="$RUN" --max_new_tokens=32 \
        --task=Spelling,Spelling,Spelling,Spelling,SpellingBee,Arithmetic --init_lr_frac=0.3 --eval_every=0 "${rl[@]}" --resume
    stage chat_eval_rl - "${ranks[@]}" scripts.chat_eval -i rl "${chat[@]}"
    stage rag_data rag_data/dataset.json python -m scripts.prepare_rag_dataset --mode world --max_facts=2 --questions=5000 \
        --kinds=1hop,1hop,1hop,1hop,counterfactual,missing --output="$NANOCHAT_BASE_DIR/rag_data" --overwrite
    stage rag_finetune "rag_checkpoints/$TAG" python -m scripts.rag_finetune --model_tag="$TAG" --run="$RUN" \
        --knowledge_base="$NANOCHAT_BASE_DIR/rag_data" --max_doc_length=64 --absent_share=0.1 --retrieved_share=0.1 \
        --follow_ups=8 --eval_every=0 "${rag[@]}" --resume
    stage rag_eval - "${ranks[@]}" scripts.rag_eval --model_tag="$TAG" --knowledge_base="$NANOCHAT_BASE_DIR/rag_data" \
        --max_doc_length=64 --max_problems="${SPEEDRUN_RAG_PROBLEMS:-500}" --size_questions="$(((${SPEEDRUN_RAG_PROBLEMS:-500} + 4) / 5))"
    stage hop_data hop_data/dataset.json python -m scripts.prepare_rag_dataset --mode world --world_size=base --chunk_tokens=0 \
        --kinds=1hop,2hop,3hop,missing --questions="${SPEEDRUN_HOP_QUESTIONS:-6000}" --val_share=0.1 --output="$NANOCHAT_BASE_DIR/hop_data" --overwrite
    stage refrag_finetune "refrag_checkpoints/$TAG" "${ranks[@]}" scripts.refrag_finetune --model_tag="$TAG" --run="$RUN" \
        --knowledge_base="$NANOCHAT_BASE_DIR/hop_data" --eval_every=0 --eval_examples=24 --max_new_tokens=400 \
        --examples_per_step=8 --device_batch_size=4 "${refrag[@]}" --resume
    stage refrag_eval - "${ranks[@]}" scripts.rag_eval --mode multihop --model_tag="$TAG" \
        --knowledge_base="$NANOCHAT_BASE_DIR/hop_data" --max_problems="${SPEEDRUN_HOP_PROBLEMS:-100}"
}

# check_gpus N RL_FLAGS CONFIG FLAG ...: refuse a number of GPUs that a step of base_train or chat_rl cannot be dealt to
# alike, before hours of downloads and training.
check_gpus() {
    python - "$@" <<'PY'
from nanochat.common import run_script
from nanochat.config import UserError, load_config
from scripts.base_train import BaseTrainConfig
from scripts.chat_rl import ChatRLConfig

def main(argv):
    base, rl = load_config(BaseTrainConfig, argv[2:]), load_config(ChatRLConfig, argv[1].split())

    def refusal(gpus):
        for stage, dealt in (("SPEEDRUN_TRAIN", base.grad_accum), ("SPEEDRUN_RL", rl.examples_per_rank)):
            try:
                dealt(gpus)
            except UserError as e:
                return f"{e} in {stage}"

    asked = int(argv[0])
    if why := refusal(asked):
        fits = max((n for n in range(1, asked) if not refusal(n)), default=0)
        raise UserError(why + (f", or fewer GPUs: GPUS={fits} bash speedrun.sh" if fits else ""))

run_script(main)
PY
}

# The recipe of the first nanochat: 2 billion characters for the tokenizer, 240 shards of text for the model, 20 tokens a
# parameter. Not yet run by us from end to end.
gpu_run() {
    local gpus=$1 download
    local -a torchrun=(torchrun --standalone --nproc_per_node="$gpus" -m --) # without --, torchrun takes --run for its own
    local -a base=(configs/transformer_d20.py --depth="${DEPTH:-20}") flags mid sft rl
    read -ra flags <<<"${SPEEDRUN_TRAIN:-}"
    read -ra mid <<<"${SPEEDRUN_MID:-}"
    read -ra sft <<<"${SPEEDRUN_SFT:-}"
    read -ra rl <<<"${SPEEDRUN_RL:-}"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    check_gpus "$gpus" "${rl[*]}" "${base[@]}" "${flags[@]}"
    stage dataset_8 base_data python -m nanochat.dataset -n 8
    python -m nanochat.dataset -n 240 >"$STAMPS/download.log" 2>&1 &
    download=$!
    stage tok_train tokenizer python -m scripts.tok_train --max_chars=2000000000
    stage tok_eval - python -m scripts.tok_eval
    echo "== waiting for the download (see $STAMPS/download.log)"
    wait "$download" || { tail -n 3 "$STAMPS/download.log" >&2 && exit 1; }
    stage base_train "base_checkpoints/$TAG" "${torchrun[@]}" scripts.base_train "${base[@]}" \
        --model_tag="$TAG" --run="$RUN" "${flags[@]}" --resume
    stage base_loss - "${torchrun[@]}" scripts.base_loss --model_tag="$TAG"
    stage base_eval - "${torchrun[@]}" scripts.base_eval --model_tag="$TAG"
    stage mid_train "mid_checkpoints/$TAG" "${torchrun[@]}" scripts.mid_train --model_tag="$TAG" --tasks=nanochat-mid \
        --run="$RUN" "${mid[@]}" --resume
    stage chat_eval_mid - "${torchrun[@]}" scripts.chat_eval -i mid --model_tag="$TAG" --tasks=chatcore
    stage chat_sft "sft_checkpoints/$TAG" "${torchrun[@]}" scripts.chat_sft --model_tag="$TAG" --tasks=nanochat-sft \
        --run="$RUN" "${sft[@]}" --resume
    stage chat_eval_sft - "${torchrun[@]}" scripts.chat_eval -i sft --model_tag="$TAG" --tasks=chatcore
    stage chat_rl "rl_checkpoints/$TAG" "${torchrun[@]}" scripts.chat_rl --model_tag="$TAG" --task=GSM8K --run="$RUN" \
        "${rl[@]}" --resume
    stage chat_eval_rl - "${torchrun[@]}" scripts.chat_eval -i rl --model_tag="$TAG" --tasks=GSM8K
}

GPUS="${GPUS:-$(count_gpus)}"
if [ "$GPUS" = 0 ]; then TAG=tiny_hybrid; else TAG="d${DEPTH:-20}"; fi
if [ -n "${FRESH:-}" ]; then rm -rf "$STAMPS" "$NANOCHAT_BASE_DIR"/{base,mid,sft,rag,refrag,rl}_checkpoints/"$TAG"{,_cold}; fi
mkdir -p "$STAMPS"
stage report_reset - python -m nanochat.report reset
if [ "$GPUS" = 0 ]; then cpu_run; else gpu_run "$GPUS"; fi
python -m nanochat.report generate
echo "== the base model goes on from a text, the chat model answers"
python -m scripts.chat_cli -i base --model_tag="$TAG" -p "The river"
python -m scripts.chat_cli -i sft --model_tag="$TAG" -p "What is 17 + 25?"
echo "== done in $((SECONDS / 60)) min $((SECONDS % 60)) s; the report is report.md"
echo "   more of it:  NANOCHAT_BASE_DIR=$NANOCHAT_BASE_DIR .venv/bin/python -m scripts.chat_cli -i sft --model_tag=$TAG"
