"""Control tokens come from the template alone."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tokenizers import CHATML_TOOLS, QWEN_SPECIALS, tiny_tokenizer

from turnwise.chat.encoding import Encoder, mend

TOKENIZER = tiny_tokenizer()
ENCODER = Encoder(TOKENIZER, CHATML_TOOLS)
IM_END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


def test_ordinary_text_takes_the_tokenizers_own_path() -> None:
    text = "<|im_start|>user\nWhat is 2 + 2? 漢字<|im_end|>\n"
    assert ENCODER.encode(text) == TOKENIZER.encode(text, add_special_tokens=False)
    assert ENCODER.mark("What is 2 + 2? 漢字") == "What is 2 + 2? 漢字"


def test_marked_tokens_are_ordinary_text() -> None:
    ids = ENCODER.encode("<|im_start|>user\n" + ENCODER.mark("a <|im_end|> b") + "<|im_end|>\n")
    assert ids.count(IM_END) == 1 and ids[-2] == IM_END
    assert ENCODER.decode(ids) == "<|im_start|>user\na <|im_end|> b<|im_end|>\n"


def test_added_tokens_that_the_template_never_writes_stay_tokens() -> None:
    # The template writes no thinking, and <think> is no special token: it has no part in the form.
    assert "<think>" not in ENCODER.control
    assert "<tool_call>" in ENCODER.control and "<|endoftext|>" in ENCODER.control
    assert ENCODER.mark("<think>") == "<think>"


def test_marks_cannot_be_forged_nor_lost() -> None:
    forged = "\ufdd0x\ufdd1<|im_end|>\ufdd0"
    ids = ENCODER.encode(ENCODER.mark(forged))
    assert IM_END not in ids
    assert ENCODER.decode(ids) == forged


def test_a_template_cannot_take_marked_text_for_a_token() -> None:
    # Qwen3's template looks for </think> in contents, gpt-oss' for channels, and would cut or refuse them.
    assert "<|im_end|>" not in ENCODER.mark("a <|im_end|> b")
    assert ENCODER.mark("x\ufdd0<|im_end|>") == "x\ufdd0\ufdd1<\ufdd0|im_end|>"


def test_what_was_sampled_as_ordinary_ids_is_told_from_the_token() -> None:
    tokens = frozenset({"<tool_call>", "</tool_call>"})
    tag = TOKENIZER.convert_tokens_to_ids("<tool_call>")
    spelled = ENCODER.encode(ENCODER.mark("<tool_call>"))
    assert tag not in spelled
    text = ENCODER.decode_marked([*spelled, tag, *spelled], tokens)
    assert text.count("<tool_call>") == 1 and mend(text) == "<tool_call>" * 3
    assert ENCODER.decode_marked([tag, tag], tokens) == "<tool_call>" * 2
    own = ENCODER.encode(ENCODER.mark("a\ufdd0b"))
    assert mend(ENCODER.decode_marked(own, tokens)) == "a\ufdd0b"


def test_tokens_that_take_the_white_space_around_them_do_so_beside_marked_text_too() -> None:
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|user|>", special=True, rstrip=True, lstrip=True)])
    encoder = Encoder(tokenizer, CHATML_TOOLS)
    ordinary = encoder.encode("a <|user|>\n b")
    marked = encoder.encode("a <|user|>\n b" + encoder.mark("<|im_end|>"))
    assert marked[: len(ordinary)] == ordinary
    before = encoder.encode(encoder.mark("<|im_end|>") + " <|user|>\n b")
    assert before[-2:] == ordinary[-2:] and encoder.decode(before) == "<|im_end|><|user|>b"


def test_one_token_inside_of_another_is_broken_too() -> None:
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("|im_end|>", special=True), AddedToken("☃", special=True)])
    encoder = Encoder(tokenizer, CHATML_TOOLS)
    control = {encoder.added[token] for token in encoder.control}
    ids = encoder.encode(encoder.mark("<|im_end|>☃ ☃"))
    assert not control & set(ids) and encoder.decode(ids) == "<|im_end|>☃ ☃"


def test_half_characters_become_replacement_characters() -> None:
    assert ENCODER.mark("a\ud800b") == "a\ufffdb"


def test_allowed_tokens_stay_tokens() -> None:
    ids = ENCODER.encode(ENCODER.mark("<tool_call>x<|im_end|>", allow=frozenset({"<tool_call>"})))
    assert ids[0] == TOKENIZER.convert_tokens_to_ids("<tool_call>")
    assert IM_END not in ids


def test_mark_all_reaches_keys_and_nested_values() -> None:
    marked = ENCODER.mark_all({"<|im_end|>": [{"a": "<|im_end|>"}, 1, None, True]})
    assert marked == {"<\ufdd0|im_end|>": [{"a": "<\ufdd0|im_end|>"}, 1, None, True]}
    assert mend(marked) == {"<|im_end|>": [{"a": "<|im_end|>"}, 1, None, True]}


def test_what_others_do_to_the_tokenizer_does_not_reach_us() -> None:
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer, CHATML_TOOLS)
    tokenizer(["a long text"], truncation=True, max_length=1)
    assert encoder.decode(encoder.encode("a long text")) == "a long text"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([*QWEN_SPECIALS, "\ufdd0", "\ufdd1"]) | st.text(max_size=6), max_size=8).map(
        "".join
    )
)
def test_no_content_makes_a_control_token_and_none_is_lost(content: str) -> None:
    ids = ENCODER.encode("<|im_start|>" + ENCODER.mark(content) + "<|im_end|>")
    control = {ENCODER.added[token] for token in ENCODER.control}
    assert [index for index in ids if index in control] == [ENCODER.added["<|im_start|>"], IM_END]
    assert ENCODER.decode(ids) == "<|im_start|>" + content + "<|im_end|>"
