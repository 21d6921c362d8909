"""Answers requests in batches, for inference/batch.py."""

import argparse
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inference.beam import finish_beams, rank_boxes
from inference.requests import Job
from inference.shortcuts import prefill_after, prefill_image, with_drafts
from kosmos2 import DecodeState, GenerationOptions, finish, open_image, pad_left, preprocess_image
from sample import Answer, decoding_options, encode_request, read_answer
from tokenizer import Entity, tokens_to_box


@dataclass
class Question:
    """A request as a row of a batch."""

    job: Job
    ids: list[int]  # the encoded prompt
    image_mask: list[bool]
    options: dict  # of `Kosmos2.prefill`
    image_embeds: Tensor | None = None  # (I, Q, D), of all images of the prompt
    answer: Answer | None = None


@dataclass
class Group:
    """Consecutive requests about the same images."""

    jobs: list[Job]
    questions: list[Question] = field(default_factory=list)  # the requests that can be answered
    errors: list[tuple[list[Job], Exception]] = field(default_factory=list)  # the others
    pixels: list[Tensor] = field(default_factory=list)  # (3, image_size, image_size) of each image
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (width, height) of each image


class Runner:
    """Answers batches with one model.

    given: decoding options that replace the defaults.
    """

    def __init__(self, args: argparse.Namespace, model, tokenizer, given: dict):
        self.args = args
        self.model = model
        self.tokenizer = tokenizer
        self.device = model.decoder.layer_norm.weight.device
        self.given = given
        self.image_ids, _ = tokenizer.encode_prompt("")

    def load(self, jobs: list[Job]) -> Group:
        """Read and preprocess the images of requests that share them, and encode their prompts."""
        group = Group(jobs)
        try:
            for name in jobs[0].request.images:
                image = open_image(name)
                group.pixels.append(preprocess_image(image, self.model.config.vision.image_size))
                group.sizes.append(image.size)
        except Exception as error:  # Pillow's decoders raise many kinds
            group.errors.append((jobs, error))
            return group
        for job in jobs:
            try:
                ids, image_mask = encode_request(self.tokenizer, job.request, group.sizes)
                if self.args.top_boxes:
                    ids.append(self.tokenizer.special_ids["<object>"])
                    image_mask.append(False)
                    self.model.check_length([len(ids)], 2)
                    options = {"max_new_tokens": 2}
                else:
                    options = decoding_options(self.model, self.tokenizer, job.request, len(ids), self.given)
                    GenerationOptions(**options)  # raises for this request alone
                    self.model.check_length([len(ids)], options["max_new_tokens"])
                group.questions.append(Question(job, ids, image_mask, options))
            except (ValueError, TypeError) as error:
                group.errors.append(([job], error))
        return group

    def answer(self, groups: list[Group]) -> None:
        """Answer all requests of a batch: sets `question.answer`."""
        self.encode_images(groups)
        unshared = []
        for group in groups:
            shared = group.questions if all(map(self.begins_with_image, group.questions)) else []
            # A batch of many images is faster than one of a few questions about one image.
            if shared and (2 * len(shared) > self.args.batch_size or self.args.top_boxes):
                prefix = prefill_image(self.model, self.tokenizer, shared[0].image_embeds)
                for questions in self.parts(shared):
                    self.generate(questions, prefix)
            else:
                unshared += group.questions
        for questions in self.parts(unshared):
            self.generate(questions)

    def encode_images(self, groups: list[Group]) -> None:
        """Encode the images of all groups as one batch: sets `question.image_embeds`."""
        pixels = [image for group in groups for image in group.pixels]
        if not pixels:
            return
        with torch.inference_mode():
            image_embeds = self.model.encode_image(torch.stack(pixels).to(self.device))  # (I, Q, D)
        start = 0
        for group in groups:
            end = start + len(group.pixels)
            for question in group.questions:
                question.image_embeds = image_embeds[start:end]
            start = end

    def begins_with_image(self, question: Question) -> bool:
        """Whether the prompt has one image, followed by text: such prompts can share its prefill."""
        count = len(self.image_ids)
        if question.ids[:count] != self.image_ids or len(question.ids) == count:
            return False
        return not any(question.image_mask[count:])

    def parts(self, questions: list[Question]) -> list[list[Question]]:
        """Batches of at most --batch-size questions with the same decoding options.

        (Few-shot prompts run without n-gram blocking, and a prompt that nearly fills the context has
        a limit of its own.)
        """
        same_options = defaultdict(list)
        for question in questions:
            values = (question.options.get("no_repeat_ngram_size"), question.options["max_new_tokens"])
            same_options[values].append(question)
        size = 1 if self.args.top_boxes else self.args.batch_size
        batches = []
        for same in same_options.values():
            batches += [same[start : start + size] for start in range(0, len(same), size)]
        return batches

    def generate(self, questions: list[Question], prefix: DecodeState | None = None) -> None:
        """Answer some questions as one batch. prefix: the state after their image."""
        past = 0 if prefix is None else len(self.image_ids)
        prompts = [(question.ids[past:], question.image_mask[past:]) for question in questions]
        tokens, image_mask, pad_mask = pad_left(prompts, self.device)
        options = questions[0].options
        if prefix is not None:
            state = prefill_after(prefix, tokens, pad_mask, **options)
        else:
            embeds = [question.image_embeds for question in questions if question.image_embeds is not None]
            image_embeds = torch.cat(embeds) if embeds else None  # (I, Q, D)
            state = self.model.prefill(tokens, None, image_embeds, image_mask, pad_mask, **options)
        if self.args.top_boxes:
            questions[0].answer = self.rank_boxes(questions[0], state)
            return
        if self.args.num_beams > 1:
            rows = finish_beams(state, self.args.num_beams)
        else:
            rows = finish(with_drafts(state, self.tokenizer))
        for question, row in zip(questions, rows, strict=True):
            question.answer = read_answer(self.tokenizer, question.job.request, row)

    def rank_boxes(self, question: Question, state) -> Answer:
        """The most likely boxes for the phrase that the prompt ends with, best first."""
        ranked = rank_boxes(state, self.tokenizer, self.args.top_boxes)
        boxes = [tokens_to_box(ul, lr, self.tokenizer.grid) for _, ul, lr in ranked]
        scores = [score for score, _, _ in ranked]
        ids = question.ids[:-1]  # without <object>
        text, _ = self.tokenizer.parse_output(ids, [])
        raw = self.tokenizer.decode(ids).strip()
        return Answer(text, raw, [Entity(text, (0, len(text)), boxes, scores)])
