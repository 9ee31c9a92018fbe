"""Tokens become words again, in every kind of tokenizer and every script, and no token is lost on the way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mistudio_engine.demo.embedded import model_folder
from mistudio_engine.discovery.words import ContextWords, WordReader

TEXTS = {
    "English": "It's unbelievable, isn't it? The U.S. won 3.14 to 2 at 10:30... well-known snake_case don’t.\nYes.",
    "French": "Le café naïf coûtait déjà très cher à l’élève ; où est-il ?",
    "Chinese": "你好世界。我们今天去北京，天气很好！",
    "Japanese": "東京タワーはとても高いです。",
    "Thai": "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "Arabic": "مرحبا بالعالم، كيف حالك اليوم؟",
    "Hindi": "नमस्ते दुनिया, आप कैसे हैं? हिन्दी में लिखिए।",
    "Russian": "Привет, мир! Как дела?",
    "emoji": "A family 👩‍👩‍👧 waves 👋🏽 at 🇩🇪🇫🇷 with a ❤️ today",
    "code": "def read_file(path): return open(path) # see https://a.example/b?c=d and me@b.example.org",
}
WORDS = [
    *("It's", "unbelievable", "isn't", "U.S.", "3.14", "10:30", "...", "well", "known", "snake_case", "don’t"),
    *("café", "naïf", "coûtait", "déjà", "l’élève"),
    *("مرحبا", "بالعالم", "اليوم", "नमस्ते", "दुनिया", "हिन्दी", "Привет", "дела"),
    *("👩‍👩‍👧", "👋🏽", "🇩🇪", "🇫🇷", "❤️"),
    *("def", "read_file", "https://a.example/b?c=d", "me@b.example.org"),
]
"""Some words that a person sees in the texts."""

SPECIAL = ["<s>", "</s>", "<unk>"]


def byte_level(vocab_size: int = 300) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train(backend, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, **COMMON))


def unigram() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return train(backend, trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", **COMMON))


def byte_fallback() -> Tokenizer:
    """As in Llama: pieces of a few letters, and single bytes for all that the vocabulary lacks."""
    pieces = [
        *SPECIAL,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghilnorstuvwy",
        "▁un",
        "be",
        "le",
        "bel",
    ]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "u"), ("b", "e"), ("l", "e"), ("be", "l")]
    vocab["▁u"] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return backend


def wordpiece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return train(backend, trainers.WordPieceTrainer(vocab_size=500, **COMMON))


COMMON = {"special_tokens": SPECIAL, "show_progress": False}


def train(backend: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    backend.train_from_iterator(list(TEXTS.values()), trainer)
    return backend


MADE = {"byte-level": byte_level, "unigram": unigram, "byte fallback": byte_fallback, "wordpiece": wordpiece}
REAL = {"bitllama": "bitllama-3M-hf", "stories": "stories260K-hf"}


@pytest.fixture(scope="module", params=[*MADE, "embedded", *REAL])
def tokenizer(request):
    if request.param in MADE:
        marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        return PreTrainedTokenizerFast(tokenizer_object=MADE[request.param](), **marks)
    if request.param == "embedded":
        return AutoTokenizer.from_pretrained(model_folder())
    return AutoTokenizer.from_pretrained(request.getfixturevalue("shared") / "data" / REAL[request.param])


def encoded(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_partition(found: ContextWords, n_tokens: int) -> None:
    assert [word.start for word in found.words] == [0, *(word.end for word in found.words[:-1])][: len(found.words)]
    assert all(word.start < word.end for word in found.words)
    assert not n_tokens or found.words[-1].end == n_tokens
    assert found.word_of.tolist() == [i for i, word in enumerate(found.words) for _ in range(word.start, word.end)]


@pytest.mark.parametrize("language", TEXTS)
def test_the_text_is_the_tokenizers_own_and_every_token_lies_in_one_word(tokenizer, language):
    ids = encoded(tokenizer, TEXTS[language])
    found = WordReader(tokenizer).read(ids)
    check_partition(found, len(ids))
    if tokenizer.unk_token_id not in ids:
        own = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert found.text.removeprefix(" ") == own.removeprefix(" ")
    for word in found.words:
        assert found.text[word.begin :].startswith(word.text)
        begin, end = found.offsets[word.start, 0], found.offsets[word.end - 1, 1]
        assert found.text[begin:end].strip() == word.text.strip()


@pytest.mark.parametrize("language", TEXTS)
def test_a_character_of_several_tokens_is_shown_by_the_first_of_them(tokenizer, language):
    reader = WordReader(tokenizer)
    ids = encoded(tokenizer, TEXTS[language])
    found, read = reader.pieces(ids), reader.read(ids)
    assert "".join(found.texts) == read.text
    for token, (by, begin) in enumerate(zip(found.shown_by.tolist(), read.offsets[:, 0].tolist(), strict=True)):
        if found.texts[token] or ids[token] in tokenizer.all_special_ids:
            assert by == token
        else:
            assert by < token
            before = sum(len(text) for text in found.texts[:by])
            assert before <= begin < before + len(found.texts[by]), "what is shown there holds the token's own place"


@pytest.mark.parametrize("language", TEXTS)
def test_each_token_lies_where_the_tokenizers_own_offsets_say(tokenizer, language):
    text = TEXTS[language]
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, own = encoding["input_ids"], encoding["offset_mapping"]
    found = WordReader(tokenizer).read(ids)
    if tokenizer.unk_token_id in ids:
        pytest.skip("the tokenizer lacks letters of this text")
    assert len(own) == len(ids)
    for (begin, end), (own_begin, own_end) in zip(found.offsets.tolist(), own, strict=True):
        if ours := found.text[begin:end].strip():  # it gives the space that it puts before a text the first letter
            assert ours == text[own_begin:own_end].strip()


def test_people_see_the_words_that_they_would_see_in_the_text(tokenizer):
    if "##" in "".join(tokenizer.get_vocab()):
        pytest.skip("it cuts at every sign and does not say where a space was")
    texts = {text: encoded(tokenizer, text) for text in TEXTS.values()}
    known = " ".join(text for text, ids in texts.items() if tokenizer.unk_token_id not in ids)
    reader = WordReader(tokenizer)
    seen = {word.text for ids in texts.values() for word in reader.read(ids).words}
    expected = {word for word in WORDS if word in known}
    assert len(expected) > 10
    assert not expected - seen


def test_pieces_become_the_word_and_say_which_tokens_it_has():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_fallback(), bos_token="<s>", unk_token="<unk>")
    ids = [0, *encoded(tokenizer, "so unbelievable")]
    found = WordReader(tokenizer).read(ids)
    word = found.words[-1]
    assert word.text == "unbelievable"
    assert "".join(WordReader(tokenizer).strings(ids[word.start : word.end])) == " unbelievable"
    assert found.words[0] == ("<s>", 0, 1, 0, True)


def test_wordpieces_are_joined_and_a_full_stop_is_not():
    vocab = {piece: i for i, piece in enumerate([*SPECIAL, "un", "##believ", "##able", "cat", "."])}
    backend = Tokenizer(models.WordPiece(vocab=vocab, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(prefix="##")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    found = WordReader(tokenizer).read(encoded(tokenizer, "unbelievable cat."))
    assert [word.text for word in found.words] == ["unbelievable", "cat", "."]
    assert found.text == " unbelievable cat."


def test_characters_cut_to_bytes_are_whole_again_and_broken_ones_stay_one_sign_a_byte():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(260), bos_token="<s>")
    ids = encoded(tokenizer, "你好 é")
    assert len(ids) == 3 + 3 + 1 + 2
    reader = WordReader(tokenizer)
    assert [(word.text, word.start, word.end) for word in reader.read(ids).words] == [
        ("你", 0, 3),
        ("好", 3, 6),
        (" ", 6, 7),
        ("é", 7, 9),
    ]
    torn = reader.read(ids[1:4])
    assert torn.text == "\ufffd" * 3
    check_partition(torn, 3)


def test_a_special_token_is_a_word_of_its_own_and_no_text():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")
    ids = [*encoded(tokenizer, "yes"), tokenizer.eos_token_id, *encoded(tokenizer, "no")]
    found = WordReader(tokenizer).read(ids)
    assert [(word.text, word.special) for word in found.words] == [("yes", False), ("</s>", True), ("no", False)]
    assert found.text == "yesno"


def test_nothing_reads_as_nothing(tokenizer):
    found = WordReader(tokenizer).read([])
    assert (found.text, found.words, len(found.offsets)) == ("", [], 0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_ids_in_any_order_are_parted_without_a_gap(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    found = WordReader(tokenizer).read(np.array(ids, dtype=np.int32))
    check_partition(found, len(ids))
    assert (np.diff(found.offsets[:, 0]) >= 0).all()
    assert (found.offsets[:, 0] <= found.offsets[:, 1]).all()
    assert found.offsets.max(initial=0) <= len(found.text)
