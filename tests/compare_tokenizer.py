"""Compare ids and decoded text with transformers' processor on many generated prompts.

    python tests/compare_tokenizer.py sentencepiece.bpe.model [--count 10000]

The file is the official sentencepiece model, which comes with the official weights.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tokenizer import Tokenizer

WORDS = [
    "a", "an", "the", "two", "image", "of", "snowman", "fire", "dog's", "cat,", "puppies", "sit", "field",
    "grass.", "Question:", "Answer:", "What", "is", "special", "about", "this", "image?", "Describe", "in",
    "detail:", '"quoted"', "(brackets)", "it's", "3.14", "1,024", "42", "2026-11-23", "100%", "$5", "50/50",
    "e-mail", "x@y.org", "C++", "#tag", "semi;", "colon:", "naïve", "café", "Ångström", "über", "señor",
    "façade", "東京", "猫", "こんにちは", "привет", "мир", "Ελλάδα", "عربى", "हिन्दी", "한국어", "🐶", "☃", "❤", "—", "–",
    "“curly”", "‘single’", "€", "£", "°", "±", "×", "a/b", "and_or", "snake_case", "CamelCase", "ALLCAPS",
    "supercalifragilistic", "...", "!?", "<", ">", "<3", "&amp;", "\\n", "[x]", "{y}", "~", "^", "|", "*",
    "==", "!=", "->", "don't", "they're", "we'll", "¿qué?", "¡hola!",
]  # fmt: skip
SPACES = [" ", " ", " ", " ", "  ", "\n", "\t", ""]


def prompts(count: int, seed: int = 0) -> list[tuple[str, list | None]]:
    """Random (prompt, boxes): words in many scripts, numbers, punctuation, tags with and without spaces."""
    rng = random.Random(seed)

    def words(most):
        return "".join(rng.choice(WORDS) + rng.choice(SPACES) for _ in range(rng.randint(1, most)))

    def box():
        if rng.random() < 0.5:
            return rng.randrange(512), rng.randrange(512, 1024)
        x, y = rng.random() * 0.8, rng.random() * 0.8
        return x, y, x + 0.01 + rng.random() * 0.19, y + 0.01 + rng.random() * 0.19

    made = []
    for _ in range(count):
        text = rng.choice(["<grounding>", "<grounding> ", "  <grounding>\n", "", ""]) + words(6)
        phrases = rng.randint(0, 3)
        for _ in range(phrases):
            inside = rng.choice(["", " ", "  "]) + words(3).replace("<", "").replace("\n", " ")
            text += f"{rng.choice(SPACES)}<phrase>{inside.strip() or 'x'}{rng.choice(['', ' '])}</phrase>"
            text += rng.choice(["", "", ".", ",", "?", " .", " and ", "'s "]) + (
                words(4) if rng.random() < 0.6 else ""
            )
        if rng.random() < 0.1:
            text += "<object><patch_index_0044><patch_index_0863></object>" + rng.choice(["", ".", " is"])
        boxes = None
        if phrases and rng.random() < 0.6:
            boxes = [rng.choice([None, box(), [box()], [box(), box()]]) for _ in range(phrases)]
        made.append((text, boxes))
    return made


def official_processor(model_file: str | Path):
    """transformers' Kosmos2Processor on a sentencepiece model, with the published ids.

    The vocabulary is passed explicitly, since the published tokenizer.json is not in the repository.
    The resulting tokenizer lacks that file's normalizer and encodes characters that NFKC would change
    as <unk>; prompts() contains none.
    """
    import sentencepiece
    from transformers import CLIPImageProcessorPil, Kosmos2Processor, XLMRobertaTokenizer

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    scored = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(3, pieces.vocab_size())]
    control = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    words = XLMRobertaTokenizer(vocab=[*control, *scored, ("<mask>", 0.0)])
    return Kosmos2Processor(
        CLIPImageProcessorPil(size={"height": 224, "width": 224}, do_center_crop=False), words
    )


def compare(tokenizer: Tokenizer, processor, cases) -> list[tuple]:
    """The cases in which ids, image mask or decoded text differ, with and without an image."""
    from PIL import Image

    image = Image.new("RGB", (8, 8))
    different = []
    for text, boxes in cases:
        theirs = processor(text=text, images=image, bboxes=boxes)
        ids, mask = tokenizer.encode_prompt(text, 1, boxes)
        decoded = processor.post_process_generation(
            processor.batch_decode([theirs.input_ids], skip_special_tokens=True)[0], cleanup_and_extract=False
        )
        expected = theirs.input_ids, theirs.image_embeds_position_mask
        if (ids, [int(m) for m in mask]) != expected or tokenizer.decode(ids) != decoded:
            different.append((text, boxes, ids, theirs.input_ids, tokenizer.decode(ids), decoded))
            continue
        plain_ids = processor(text=text, bboxes=boxes, add_eos_token=True).input_ids
        if tokenizer.encode(text.strip(), boxes, add_eos=True) != plain_ids:
            different.append((text, boxes, tokenizer.encode(text.strip(), boxes, add_eos=True), plain_ids))
    return different


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_file", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    args = parser.parse_args()
    found = compare(Tokenizer(args.model_file), official_processor(args.model_file), prompts(args.count))
    for case in found[:10]:
        print(*case, sep="\n    ")
    print(f"{args.count} prompts, {len(found)} differ")
    sys.exit(bool(found))
