"""Conversations as batches: mask against template, truncation, packing, bad rows, resuming."""

import json
import random
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chats import CALL, TOOL, random_messages, small_tokenizer, sums, tiny_chat_model

from skylar.data.chat import CHATML, PretrainedTokenizer
from skylar.data.chat_rows import (
    BadRows,
    Conversation,
    conversation_of,
    read_conversations,
    split_rows,
)
from skylar.data.chatml import (
    TOOL_CHATML,
    ConversationLoader,
    RowLoader,
    chat_tokenizer,
    collate,
    encode_all,
    encode_conversation,
    find_answers,
    pack_rows,
    turn_marks,
)
from skylar.data.dialogues import play_dialogues
from skylar.data.tokenizer import BPETokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode([i for i in ids if i != -100])


# --- the mask ---


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("seed", range(60))
def test_ids_and_mask_equal_those_of_transformers(tokenizer, theirs, seed):
    rng = random.Random(seed)
    chat, tools = random_messages(rng), [TOOL] if rng.random() < 0.5 else None
    reference = theirs.apply_chat_template(
        chat, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    ours = encode_conversation(tokenizer, chat, tools=tools)
    n = len(ours.ids)
    assert list(ours.ids) == list(reference["input_ids"])[:n]
    assert [x != -100 for x in ours.labels] == [bool(m) for m in
                                                reference["assistant_masks"][1:n + 1]]
    assert not any(reference["assistant_masks"][n + 1:])
    assert [w for w in ours.weights if w] == [1.0] * sum(x != -100 for x in ours.labels)


@pytest.mark.parametrize("seed", range(40))
def test_what_a_model_is_asked_is_what_it_was_trained_on(tokenizer, seed):
    """The prompt of each answer, and the answer's tokens, are a prefix of the training row."""
    chat = random_messages(random.Random(seed), marks=True, plain=True)
    row = encode_conversation(tokenizer, chat)
    for i, message in enumerate(chat):
        if message["role"] == "assistant":
            prompt = tokenizer.chat(chat[:i])
            whole = [*row.ids, row.labels[-1]]
            assert whole[:len(prompt)] == prompt
            after = whole[len(prompt):]
            answer = after[:next(j for j, t in enumerate(after) if t in tokenizer.eos_token_ids)]
            assert tokenizer.decode(answer) == message["content"]


@pytest.mark.parametrize("seed", range(40))
def test_marks_in_messages_are_text(tokenizer, seed):
    chat = random_messages(random.Random(seed), marks=True, plain=True)
    row = encode_conversation(tokenizer, chat)
    spoken = [m["content"] + "<|im_end|>" for m in chat if m["role"] == "assistant"]
    assert text_of(tokenizer, row.labels) == "".join(spoken)
    ends = turn_marks(tokenizer)[1]
    assert sum(x in ends for x in row.labels) == len(spoken)


def test_the_template_with_tools_equals_the_plain_one_on_plain_messages(tokenizer):
    plain = PretrainedTokenizer(tokenizer.files | {"chat_template.jinja": CHATML})
    for seed in range(40):
        chat = random_messages(random.Random(seed), plain=True)
        for prompt in (True, False):
            assert tokenizer.chat(chat, prompt) == plain.chat(chat, prompt)


def test_fields_that_a_template_would_lose_are_refused(tokenizer):
    plain = PretrainedTokenizer(tokenizer.files | {"chat_template.jinja": CHATML})
    chat = [{"role": "user", "content": "hat?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    with pytest.raises(ValueError, match="writes no tool_calls"):
        encode_conversation(plain, chat)
    with pytest.raises(ValueError, match="writes no tools"):
        encode_conversation(plain, sums(1)[0], tools=[TOOL])
    assert "<tool_call>" in text_of(tokenizer, encode_conversation(tokenizer, chat).labels)


def test_weights_of_ends_and_of_whole_answers(tokenizer):
    first, second = {"role": "assistant", "content": "2"}, {"role": "assistant", "content": "3"}
    chat = [{"role": "user", "content": "1+1?"}, {**first, "weight": 0},
            {"role": "user", "content": "1+2?"}, second]
    row = encode_conversation(tokenizer, chat, end_weight=2.5)
    assert text_of(tokenizer, row.labels) == "3<|im_end|>"
    assert [w for w in row.weights if w] == [1.0, 2.5]
    with pytest.raises(ValueError, match="no answer counts"):
        encode_conversation(tokenizer, chat[:2])


def test_other_templates_by_their_own_marks(tokenizer):
    """`eos` as the end, no system message; and one that marks nothing is refused."""
    zephyr = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + "
              "'<eos>' }}{% endfor %}{% if add_generation_prompt %}"
              "{{ '<|im_start|>assistant\\n' }}{% endif %}")
    other = PretrainedTokenizer(tokenizer.files | {"chat_template.jinja": zephyr})
    assert text_of(other, encode_conversation(other, sums(3)[2]).labels) == "It is 3 3 3 .<eos>"
    silent = PretrainedTokenizer(tokenizer.files | {
        "chat_template.jinja": "{% for m in messages %}{{ m['content'] }}{% endfor %}"})
    with pytest.raises(ValueError, match="no mark before an answer"):
        encode_conversation(silent, sums(1)[0])


def test_a_tokenizer_gets_a_template_if_it_has_the_marks(tokenizer):
    bare = PretrainedTokenizer({k: v for k, v in tokenizer.files.items()
                                if k != "chat_template.jinja"})
    assert chat_tokenizer(bare).chat_template == TOOL_CHATML
    poor = BPETokenizer.train(["a b"], vocab_size=257, special_tokens=("<eos>",))
    with pytest.raises(ValueError, match="no chat template"):
        chat_tokenizer(poor)
    assert chat_tokenizer(poor, required=False).chat_template is None


def test_answers_are_found_from_head_to_end():
    ids = [7, 8, 1, 2, 7, 8, 2, 7, 9, 7, 8, 3]
    assert find_answers(ids, (7, 8), {2}) == [(2, 4), (6, 7)]  # the last one has no end
    assert find_answers([], (7, 8), {2}) == []


# --- truncation ---


@pytest.mark.parametrize("seed", range(20))
def test_truncation_keeps_whole_answers(tokenizer, seed):
    whole = encode_conversation(tokenizer, random_messages(random.Random(seed)))
    ends, chat = turn_marks(tokenizer)[1], random_messages(random.Random(seed))
    first_end = next(t for t, x in enumerate(whole.labels) if x in ends) + 1
    for max_len in range(len(whole.ids) + 2):
        if max_len < first_end:
            with pytest.raises(ValueError, match="beyond"):
                encode_conversation(tokenizer, chat, max_len=max_len)
            continue
        part = encode_conversation(tokenizer, chat, max_len=max_len)
        n = len(part.ids)
        assert n <= max_len and part.labels[-1] in ends
        assert (part.ids, part.labels) == (whole.ids[:n], whole.labels[:n])
        later = [t + 1 for t, x in enumerate(whole.labels) if x in ends and t + 1 > n]
        assert not later or later[0] > max_len  # and no shorter than it must be


# --- packing ---


@pytest.mark.parametrize("seed", range(30))
def test_rows_hold_each_once_and_none_too_much(seed):
    rng = random.Random(seed)
    size = rng.randrange(1, 60)
    lengths = [rng.randrange(1, size + 1) for _ in range(rng.randrange(80))]
    rows = pack_rows(lengths, size)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[i] for i in row) for row in rows)
    assert all(n <= size for n in filled)
    assert sum(filled[:2]) > size or len(rows) < 2  # no two of them would fit into one


def test_a_batch_is_what_a_loop_writes(tokenizer):
    rows = [encode_conversation(tokenizer, c, end_weight=2.0) for c in sums(5)]
    batch = collate([rows[:3], rows[3:]], 256)
    T = batch["input_ids"].shape[1]
    assert T % 8 == 0 and all(x.shape == (2, T) for x in batch.values())
    for b, row in enumerate([rows[:3], rows[3:]]):
        at = 0
        for n, e in enumerate(row):
            for t in range(len(e.ids)):
                found = {k: v[b, at].item() for k, v in batch.items()}
                assert found == {"input_ids": e.ids[t], "labels": e.labels[t],
                                 "weights": e.weights[t], "document_ids": n, "position_ids": t}
                at += 1
        padding = {k: set(v[b, at:].tolist()) for k, v in batch.items() if k != "position_ids"}
        assert at == T or padding == {"input_ids": {0}, "labels": {-100}, "weights": {0.0},
                                      "document_ids": {len(row)}}
    assert collate([], 256)["input_ids"].shape == (0, 8)  # a rank without rows


def loss_and_gradient(model, batch):
    model.zero_grad()
    logits = model(batch["input_ids"], batch["position_ids"], batch["document_ids"])
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


def test_packed_conversations_are_trained_as_if_alone(tokenizer):
    model = tiny_chat_model(tokenizer)
    rows = [encode_conversation(tokenizer, c) for c in sums(4)]
    packed, gradients = loss_and_gradient(model, collate([rows], 256))
    alone = [loss_and_gradient(model, collate([[e]], 256)) for e in rows]
    torch.testing.assert_close(packed, sum(loss for loss, _ in alone))
    for ours, theirs in zip(gradients, zip(*(g for _, g in alone))):
        torch.testing.assert_close(ours, sum(theirs), rtol=1e-4, atol=1e-5)


# --- the loader ---


def take(loader, n):
    return [batch for _, batch in zip(range(n), loader)]


def same(a, b):
    return a.keys() == b.keys() and all(x.equal(b[k]) for k, x in a.items())


@pytest.mark.parametrize("pack", [True, False])
def test_an_epoch_has_every_conversation_once(tokenizer, pack):
    loader = ConversationLoader(sums(23), tokenizer, 3, 96, pack=pack, prefetch=0)
    n = loader.n_rows
    assert pack == (n < 23)
    seen = Counter()
    for epoch in range(3):
        rows = [int(r) for s in range(epoch * n, (epoch + 1) * n) for r in loader.order([s])]
        assert sorted(rows) == list(range(n))
        seen[tuple(rows)] += 1
    assert len(seen) == 3  # reshuffled


def test_resumed_after_any_step(tokenizer):
    loader = ConversationLoader(sums(23), tokenizer, 3, 96)
    batches = iter(loader)
    states, found = [], []
    for _ in range(9):  # beyond the epoch
        states.append(loader.state_dict())
        found.append(next(batches))
    for state, batch in zip(states, found):
        again = ConversationLoader(sums(23), tokenizer, 3, 96)
        again.load_state_dict(json.loads(json.dumps(state)))
        assert same(next(iter(again)), batch)


def test_ranks_divide_the_rows_of_one_process(tokenizer):
    alone = ConversationLoader(sums(23), tokenizer, 4, 96)
    for n in (2, 4):
        ranks = [ConversationLoader(sums(23), tokenizer, 4 // n, 96, rank=r, world_size=n)
                 for r in range(n)]
        for whole, *parts in zip(take(alone, 5), *(take(r, 5) for r in ranks)):
            rows = [row[row != 0].tolist() for part in parts for row in part["input_ids"]]
            assert rows == [row[row != 0].tolist() for row in whole["input_ids"]]
        alone.sample_index = 0


def test_in_order_a_pass_ends_with_the_data(tokenizer):
    loader = ConversationLoader(sums(23), tokenizer, 3, 96, pack=False, shuffle=False)
    batches = take(loader, len(loader))
    assert [len(b["input_ids"]) for b in batches] == [3] * 7 + [2]
    assert loader.sample_index == 23
    last = ConversationLoader(sums(3), tokenizer, 2, 96, pack=False, shuffle=False, rank=1,
                              world_size=2)
    assert [len(b["input_ids"]) for b in take(last, 2)] == [1, 1]


@pytest.mark.parametrize("change", [
    {"seq_len": 104}, {"seed": 1}, {"pack": False}, {"shuffle": False}, {"end_weight": 2.0},
    {"conversations": sums(22)}])
def test_the_state_of_another_loader_is_refused(tokenizer, change):
    given = {"conversations": sums(23), "batch_size": 3, "seq_len": 96}
    state = ConversationLoader(tokenizer=tokenizer, **given).state_dict()
    other = ConversationLoader(tokenizer=tokenizer, **{**given, **change})
    with pytest.raises(ValueError, match="the saved loader has"):
        other.load_state_dict(state)


def test_rows_of_any_kind():
    loader = RowLoader(list(range(10)), lambda rows: {"x": torch.tensor(rows)}, 3, seed=1)
    seen = torch.cat([b["x"] for b in take(loader, 10)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:20].tolist()) == list(range(10))
    with pytest.raises(ValueError, match="there are no rows"):
        RowLoader([], list, 3)


def test_sizes_that_cannot_be(tokenizer):
    for wrong in ({"batch_size": 0}, {"seq_len": 0}, {"rank": 1}, {"end_weight": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ConversationLoader(sums(3), tokenizer, **{"batch_size": 1, "seq_len": 96, **wrong})


# --- files ---


MESSAGES = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize("row", [
    {"messages": MESSAGES},
    {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
    {"instruction": "1+1?", "output": "2"},
    {"instruction": "1+1?", "input": " ", "output": " 2\n"},
    {"prompt": "1+1?", "completion": "2"},
    {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    {"messages": [{"role": "User", "content": [{"type": "text", "text": "1+1?"}]}, MESSAGES[1]]},
])
def test_all_formats_give_the_same_conversation(row):
    assert conversation_of(row).messages == MESSAGES


def test_reasoning_tools_and_arguments_as_text():
    call = {"id": "1", "function": {"name": "weather", "arguments": '{"town": "Rome"}'}}
    row = {"messages": [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": [call]},
                        {"role": "observation", "content": "sunny"},
                        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}],
           "tools": json.dumps([TOOL])}
    found = conversation_of(row)
    assert found.tools == [TOOL] and found.messages[1]["tool_calls"] == [CALL]
    assert found.messages[3] == {"role": "assistant", "content": "Yes.",
                                 "reasoning_content": "hm"}


BAD = {
    '{"messages": [': "no JSON",
    '{"messages": NaN}': "no JSON",
    "[1]": "a list, not an object",
    '{"text": "a"}': "none of messages, conversations",
    '{"messages": []}': "no list of messages",
    '{"messages": "a"}': "no list of messages",
    '{"messages": [{"content": "a"}]}': "message 1 has no role",
    '{"messages": [{"role": "parrot", "content": "a"}]}': "unknown role 'parrot'",
    '{"messages": [{"role": "user", "content": 1}]}': "content of type int",
    '{"messages": [{"role": "user", "content": " "}]}': r"message 1 \(user\) is empty",
    '{"messages": [{"role": "user", "content": "a"}]}': "no message of the assistant",
    '{"instruction": "a", "output": ""}': r"message 2 \(assistant\) is empty",
    '{"instruction": "a"}': r"message 2 \(assistant\) is empty",
    '{"prompt": "a", "completion": [1]}': "message 2 has no role",
    '{"messages": [{"role": "assistant", "content": "a"}]}': "answers no message",
    '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, '
    '{"from": "gpt", "value": "c"}]}': "message 3 .* answers no message",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, '
    '{"role": "assistant", "content": "c"}]}': "system message that is not the first",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", '
    '"tool_calls": [{"function": {}}]}]}': "a tool call without a name",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", '
    '"weight": 2}]}': "has weight 2",
}


@pytest.mark.parametrize("line", BAD, ids=BAD.values())
def test_bad_rows_are_named_by_file_and_line(tmp_path, line):
    good = json.dumps({"messages": MESSAGES})
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    bad = BadRows("skip")
    assert len(list(read_conversations(path, bad))) == 2
    assert bad.n_rows == 3 and bad.found[0][0].endswith("chats.jsonl:3")
    with pytest.raises(ValueError, match=rf"chats\.jsonl:3: .*{BAD[line]}"):
        list(read_conversations(path))
    bad = BadRows("refuse")
    list(read_conversations(path, bad))
    with pytest.raises(ValueError, match=r"1 of 3 rows cannot be used: .*bad_rows=skip"):
        bad.close()


def test_what_is_no_utf_8_is_a_bad_row(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(json.dumps({"messages": MESSAGES}).encode() + b'\n{"a": "\xff"}\n')
    bad = BadRows("skip")
    assert len(list(read_conversations(path, bad))) == 1 and "no JSON in UTF-8" in str(bad)


def test_a_folder_is_all_of_its_files(tmp_path):
    (tmp_path / "b.json").write_text(json.dumps([{"messages": MESSAGES}] * 2))
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": MESSAGES}))
    (tmp_path / "notes.txt").write_text("no data")
    (tmp_path / ".hidden.jsonl").write_text("no data")
    found = [c.where.rpartition("/")[2] for c in read_conversations(tmp_path)]
    assert found == ["a.jsonl:1", "b.json, row 1", "b.json, row 2"]
    for missing in ("nowhere", "notes.txt"):
        with pytest.raises((ValueError, FileNotFoundError), match=missing):
            list(read_conversations(tmp_path / missing))


def test_conversations_that_do_not_fit_are_bad_rows_too(tokenizer):
    long = Conversation([{"role": "user", "content": "a " * 99}, MESSAGES[1]], None, "x.jsonl:9")
    bad = BadRows("skip")
    with pytest.warns(UserWarning, match="x.jsonl:9.*are left out"):
        assert len(encode_all([*sums(3), long], tokenizer, 64, bad=bad)) == 3
    with warnings.catch_warnings(action="error"):
        bad.close()  # it says so once
    assert bad.found[0][0] == "x.jsonl:9" and "beyond the 64" in bad.found[0][1]
    with pytest.raises(ValueError, match="x.jsonl:9"):
        encode_all([long], tokenizer, 64, bad=BadRows("refuse"))
    with pytest.raises(ValueError, match="conversation 1: the first answer"):
        encode_all([long.messages], tokenizer, 64)


@pytest.mark.parametrize(("n", "fraction", "held"), [
    (10, 0.2, 2), (10, 0.0, 0), (10, 0.001, 1), (3, 0.5, 2), (1, 0.5, 0), (2, 0.5, 1)])
def test_rows_for_validation(n, fraction, held):
    train, val = split_rows(range(n), fraction)
    assert len(val) == held and sorted([*train, *val]) == list(range(n))
    assert len(train) >= 1


def test_dialogues_of_a_play():
    play = "ACT I\n\nANN:\nOne?\n\nBEN:\nTwo.\n\n[Enter CAT]\n\nCAT:\nHa!\n\nANN:\nThree?"
    found = [[m["content"] for m in c.messages] for c in play_dialogues([play], system=False)]
    assert found == [["One?", "Two."], ["Ha!", "Three?"]]


def test_encoded_arrays_are_what_was_encoded(tokenizer):
    (array,) = encode_all(sums(1), tokenizer)
    plain = encode_conversation(tokenizer, sums(1)[0])
    assert [np.asarray(a).tolist() for a in array] == [list(x) for x in plain]
