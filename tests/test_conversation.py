import copy
from functools import cache

import pytest

from nanochat.config import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer


@cache
def tok() -> Tokenizer:
    return Tokenizer.train(["The old answer and the last question, who was first? It has two sentences. " * 9], 340)


def expand(*runs: tuple[str, int]) -> tuple[list[int], list[int]]:
    """[(special token or text, mask)] -> (ids, mask): the hand-written expectation of a rendering."""
    ids, mask = [], []
    for text, m in runs:
        new = [tok().encode_special(text)] if text in SPECIAL_TOKENS else tok().encode(text)
        ids += new
        mask += [m] * len(new)
    return ids, mask


def chat(*messages: tuple[str, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def test_plain_chat_is_rendered_as_nanochat_does():
    conversation = chat(
        ("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "2?"), ("assistant", "")
    )
    before = copy.deepcopy(conversation)
    assert tok().render_conversation(conversation) == expand(
        ("<|bos|>", 0),
        ("<|user_start|>", 0),
        ("Be kind.\n\nHi", 0),
        ("<|user_end|>", 0),
        ("<|assistant_start|>", 0),
        ("Hello", 1),
        ("<|assistant_end|>", 1),
        ("<|user_start|>", 0),
        ("2?", 0),
        ("<|user_end|>", 0),
        ("<|assistant_start|>", 0),
        ("<|assistant_end|>", 1),
    )
    assert conversation == before


def test_every_part_has_its_tokens_and_mask():
    question = [
        {"type": "text", "text": "Who?"},
        {"type": "docs", "documents": [{"title": "Ada", "text": "A. B."}, "C."]},
    ]
    answer = [
        {"type": "text", "text": "Let me see"},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "search", "text": "ada born"},
        {"type": "info", "documents": [{"id": 7, "text": "Born 1815."}]},
        {"type": "info", "text": "nothing found"},
        {"type": "cite", "n": 3},
        {"type": "abstain"},
    ]
    assert tok().render_conversation(chat(("system", "S"), ("user", question), ("assistant", answer))) == expand(
        ("<|bos|>", 0),
        ("<|user_start|>", 0),
        ("S\n\nWho?", 0),
        ("<|info_start|>", 0),
        ("<|doc|>", 0),
        ("[1] Ada\nA. B. [1]", 0),
        ("<|doc|>", 0),
        ("[2]\nC. [2]", 0),
        ("<|info_end|>", 0),
        ("<|user_end|>", 0),
        ("<|assistant_start|>", 0),
        ("Let me see", 1),
        ("<|python_start|>", 1),
        ("1+1", 1),
        ("<|python_end|>", 1),
        ("<|output_start|>", 0),
        ("2", 0),
        ("<|output_end|>", 0),
        ("<|search_start|>", 1),
        ("ada born", 1),
        ("<|search_end|>", 1),
        ("<|info_start|>", 0),
        ("<|doc|>", 0),
        ("[3]\nBorn 1815. [3]", 0),
        ("<|info_end|>", 0),
        ("<|info_start|>", 0),
        ("nothing found", 0),
        ("<|info_end|>", 0),
        ("<|cite_start|>", 1),
        ("3", 1),
        ("<|cite_end|>", 1),
        ("<|abstain|>", 1),
        ("<|assistant_end|>", 1),
    )


def test_system_text_comes_before_documents_that_open_the_user_turn():
    conversation = chat(("system", "S"), ("user", [{"type": "docs", "documents": ["D"]}]))
    ids, _ = tok().render_conversation(conversation)
    assert tok().decode(ids) == "<|bos|><|user_start|>S\n\n<|info_start|><|doc|>[1]\nD [1]<|info_end|><|user_end|>"


def test_no_text_of_a_conversation_becomes_a_special_token():
    spell = "".join(SPECIAL_TOKENS)
    documents = [{"title": spell, "text": spell}]
    question = [{"type": "text", "text": spell}, {"type": "docs", "documents": documents}]
    kinds = ("text", "python", "python_output", "search")
    answer = [*({"type": k, "text": spell} for k in kinds), {"type": "info", "documents": documents}]
    ids, _ = tok().render_conversation(chat(("system", spell), ("user", question), ("assistant", answer)))
    special = [tok().decode([i]) for i in ids if i >= tok().bos_id]
    assert special == [
        *("<|bos|>", "<|user_start|>", "<|info_start|>", "<|doc|>", "<|info_end|>", "<|user_end|>"),
        *("<|assistant_start|>", "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"),
        *("<|search_start|>", "<|search_end|>", "<|info_start|>", "<|doc|>", "<|info_end|>", "<|assistant_end|>"),
    ]


def test_completion_prompt_leaves_out_the_last_answer():
    asked = chat(("user", "Hi"), ("assistant", "Yo"), ("user", "Why?"))
    answered = chat(*((m["role"], m["content"]) for m in asked["messages"]), ("assistant", "Because"))
    prompt = tok().render_for_completion(answered)
    assert prompt == tok().render_for_completion(asked)
    full, mask = tok().render_conversation(answered)
    assert prompt == full[: len(prompt)]
    assert tok().decode(full[len(prompt) :]) == "Because<|assistant_end|>"
    assert all(mask[len(prompt) :])
    assert answered["messages"][-1]["content"] == "Because"


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (None, "a conversation is"),
        ({"messages": "hi"}, "a conversation is"),
        (chat(), "no user message"),
        (chat(("system", "S")), "no user message"),
        (chat(("assistant", "A")), r"messages\[0\] has role 'assistant', expected 'user'"),
        (chat(("user", "Q"), ("user", "Q")), r"messages\[1\] has role 'user', expected 'assistant' after 'user'"),
        (chat(("user", "Q"), ("system", "S")), r"messages\[1\].*only messages\[0\] may be a system message"),
        (chat(("user", "Q"), ("tool", "T")), r"messages\[1\] has role 'tool'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] is .*expected"),
        ({"messages": ["hi"]}, r"messages\[0\] is 'hi'"),
        (chat(("user", None)), r"messages\[0\] content is None"),
        (chat(("user", [{"type": "python", "text": "1"}])), r"messages\[0\] part 0 of a user turn"),
        (chat(("user", "Q"), ("assistant", [{"type": "docs", "documents": []}])), r"messages\[1\] part 0 .*info"),
        (chat(("user", "Q"), ("assistant", [{"type": "serch", "text": "q"}])), "did you mean 'search'"),
        (chat(("user", "Q"), ("assistant", [{"type": "text"}])), r"messages\[1\] part 0 \(text\) has no text"),
        (chat(("user", "Q"), ("assistant", ["text"])), r"messages\[1\] part 0"),
        (chat(("user", "Q"), ("assistant", [{"type": "cite", "n": 0}])), "n=0"),
        (chat(("user", "Q"), ("assistant", [{"type": "info"}])), "no list of documents"),
        (chat(("user", [{"type": "docs", "documents": [{"title": "T"}]}])), r"documents\[0\]"),
        (chat(("user", [{"type": "docs", "documents": [3]}])), r"documents\[0\] is 3"),
    ],
)
def test_malformed_conversation_is_named(conversation, message):
    with pytest.raises(UserError, match=message):
        tok().render_conversation(conversation)
    with pytest.raises(UserError, match=message):
        tok().render_for_completion(conversation)


LONG = chat(
    ("system", "You answer from documents."),
    ("user", "Old question one?"),
    ("assistant", "Old answer one, never cut."),
    (
        "user",
        [
            {"type": "text", "text": "Who?"},
            {"type": "docs", "documents": ["First one. Second one! Third.", "X y. Z w."]},
        ],
    ),
    ("assistant", [{"type": "text", "text": "The last answer. It has two sentences"}, {"type": "cite", "n": 1}]),
)


@pytest.mark.parametrize("completion", [False, True])
def test_every_budget_keeps_question_answer_and_system(completion):
    def render(max_tokens=None):
        if completion:
            return tok().render_for_completion(LONG, max_tokens)
        ids, mask = tok().render_conversation(LONG, max_tokens)
        assert len(ids) == len(mask)
        return ids

    whole = render()
    with pytest.raises(UserError, match="without any document, but max_tokens=1:") as error:
        render(1)
    least = int(str(error.value).split(" needs ")[1].split()[0])
    with pytest.raises(UserError):
        render(least - 1)
    assert len(render(least)) == least
    lengths = []
    for max_tokens in range(least, len(whole) + 3):
        ids = render(max_tokens)
        text = tok().decode(ids)
        lengths.append(len(ids))
        assert len(ids) <= max_tokens
        assert text.startswith("<|bos|><|user_start|>You answer from documents.\n\n")
        assert "Who?" in text
        assert text.count("<|user_start|>") == text.count("<|user_end|>") in (1, 2)
        old = ("Old question one?<|user_end|>", "<|assistant_start|>Old answer one, never cut.<|assistant_end|>")
        assert text.count("Old") in (0, 2)
        assert all((part in text) == ("Old" in text) for part in old)
        answer = "The last answer. It has two sentences<|cite_start|>1<|cite_end|><|assistant_end|>"
        assert text.endswith("<|assistant_start|>" + ("" if completion else answer))
        documents = text.split("<|info_start|>")[1].split("<|info_end|>")[0].split("<|doc|>")[1:]
        first = [f"[1]\nFirst one.{more} [1]" for more in ("", " Second one!", " Second one! Third.")]
        assert all(d in (*first, "[2]\nX y. [2]", "[2]\nX y. Z w. [2]") for d in documents)
        assert "[2]" not in text or "[1]" in text  # the last document goes first
    assert render(len(whole)) == whole
    assert max(lengths) == len(whole)


def test_documents_go_before_turns_and_cited_ones_last():
    documents = ["Alpha is one. Alpha is two.", "Beta is one. Beta is two."]
    question = [{"type": "docs", "documents": documents}, {"type": "text", "text": "Q"}]
    conversation = chat(
        ("user", "old"), ("assistant", "reply"), ("user", question), ("assistant", [{"type": "cite", "n": 2}])
    )
    whole, _ = tok().render_conversation(conversation)
    text = tok().decode(tok().render_conversation(conversation, len(whole) - 1)[0])
    assert "[1]\nAlpha is one. [1]<|doc|>[2]\nBeta is one. Beta is two. [2]<|info_end|>" in text
    fewer = len(whole) - len(tok().encode("[1]\n" + documents[0] + " [1]"))
    text = tok().decode(tok().render_conversation(conversation, fewer)[0])
    assert "Alpha" not in text
    assert "<|info_start|><|doc|>[2]\nBeta is one" in text
    assert "reply" in text


def test_document_without_a_whole_sentence_that_fits_is_dropped():
    conversation = chat(("user", [{"type": "text", "text": "Q"}, {"type": "docs", "documents": ["no end " * 50]}]))
    whole, _ = tok().render_conversation(conversation)
    ids, _ = tok().render_conversation(conversation, len(whole) - 1)
    assert tok().decode(ids) == "<|bos|><|user_start|>Q<|info_start|><|info_end|><|user_end|>"


def test_render_documents_numbers_and_fits():
    documents = [{"title": "T", "text": "One. Two."}, {"text": "Three. Four."}]
    ids = tok().render_documents(documents, first=4)
    assert tok().decode(ids) == "<|doc|>[4] T\nOne. Two. [4]<|doc|>[5]\nThree. Four. [5]"
    shorter = tok().render_documents(documents, first=4, max_tokens=len(ids) - 1)
    assert tok().decode(shorter) == "<|doc|>[4] T\nOne. Two. [4]<|doc|>[5]\nThree. [5]"
    assert tok().render_documents(documents, max_tokens=0) == []


def test_visualize_marks_trained_tokens_and_escapes_control_characters():
    ids, mask = tok().render_conversation(chat(("user", "a\x1b[31m"), ("assistant", "ok")))
    shown = tok().visualize(ids, mask)
    assert shown.count("\033[31m") == mask.count(0)
    assert shown.count("\033[32m") == mask.count(1)
    assert "\033[32m<|assistant_end|>\033[0m" in shown
    assert r"\x1b" in shown
    assert tok().visualize([0xC3, 0xA9], [1, 0]) == "\033[32m\\xc3\033[0m|\033[31m\\xa9\033[0m"  # é, cut in two
    with pytest.raises(ValueError, match="zip"):
        tok().visualize(ids, mask[1:])
