"""`mistudio demo`: the whole path on a real engine, with what came of it in a few lines each.

It is a client like any other: every step is one call that a person or an agent could make. On the embedded model it
also asks for the truth that only the embedded corpus knows, which concepts the SAE has found.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mistudio_engine.api.client import JobHandle, Studio, connect
from mistudio_engine.api.errors import BadInput
from mistudio_engine.api.feature_card import FeatureCard
from mistudio_engine.api.features import Example
from mistudio_engine.api.home import probe
from mistudio_engine.api.progress import bar
from mistudio_engine.api.records import Evaluation, ModelRecord, SAERecord
from mistudio_engine.api.steering import Intervention, SteerResult

if TYPE_CHECKING:
    from mistudio_engine.demo.truth import ConceptScore

__all__ = ["run"]

EMBEDDED = "embedded"

N_TOKENS = 300_000
"""Trained on, for a model and text of one's own: enough to see something, little enough to wait for."""

EXTRACT_TOKENS = 60_000
EVAL_TOKENS = 8192

OWN_PROMPT = "Once upon a time"


def run(
    *, home: Path | None, as_json: bool, keep: bool, model: str, text: str | None, hook_name: str | None, seed: int
) -> None:
    """Run the demo and print it; with `as_json` the last line is one JSON object."""
    started = time.monotonic()
    console = Console(stderr=as_json, highlight=False)
    found_running = probe(home) is not None
    if model != EMBEDDED and text is None:
        raise BadInput(f"--model {model} needs text to read.", fix="Add --text FILE, such as a .txt or .jsonl file.")
    console.print("[bold]miStudio demo[/bold]: from a language model to a steered and exported feature\n")
    studio = connect(home)
    try:
        result = _Demo(studio, console, seed).path(model, text, hook_name)
    finally:
        engine = studio.client._engine
        data = studio.client.home
        studio.close()
        if not keep and not found_running:
            from mistudio_engine.server.serve import stop

            stop(home)
    result["seconds"] = round(time.monotonic() - started, 1)
    _farewell(console, result, data, engine.url if engine and keep else None)
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")


class Steered(NamedTuple):
    """What steering along a feature did."""

    card: FeatureCard
    numbers: dict[str, Any]


def counted(scores: list[ConceptScore]) -> dict[str, dict[str, int]]:
    """How many concepts of each kind are found: by one feature, by five, and by a probe on the raw activations."""
    from mistudio_engine.demo.check import FOUND_AT

    counts = {}
    for kind in ("lexical", "contextual"):
        some = [score for score in scores if score.kind == kind]
        found = {way: sum(getattr(score, way) > FOUND_AT for score in some) for way in ("single", "five", "ceiling")}
        counts[kind] = {"n": len(some), **found}
    return counts


class _Demo:
    """The steps, with what each leaves to the next."""

    def __init__(self, studio: Studio, console: Console, seed: int) -> None:
        self.studio, self.console, self.seed = studio, console, seed
        self.n_steps = 0

    def path(self, model: str, text: str | None, hook_name: str | None) -> dict[str, Any]:
        """All steps; what `--json` prints."""
        lm = self.bring_in_model(model)
        dataset = self.bring_in_text(text, lm)
        hook_name = hook_name or self._default_hook(model, lm)
        sae = self.train(model, lm, dataset, hook_name)
        quality = self.evaluate(sae)
        scores = self.concepts(sae) if model == EMBEDDED else None
        self.extract(sae)
        self.label(sae)
        searched = self.search(sae, model)
        steered = self.steer_known(lm, sae, scores) if scores else self.steer_found(lm, sae, searched)
        self.show(steered.card)
        export_path = self.export(sae)
        return {
            "sae": sae.ref,
            "n_features": sae.d_sae,
            "fvu": round(quality.fvu, 4),
            "l0": round(quality.l0, 2),
            "ce_loss_score": round(quality.ce_loss_score, 4),
            "concepts_found": counted(scores) if scores else None,
            "searched": searched,
            "steered": steered.numbers,
            "export_path": export_path,
        }

    def heading(self, title: str) -> None:
        """The name of the next step."""
        self.n_steps += 1
        self.console.print(f"[bold cyan]{self.n_steps}.[/bold cyan] [bold]{title}[/bold]")

    def say(self, text: str) -> None:
        """A result, indented."""
        self.console.print(f"   {text}")

    def wait(self, job: JobHandle[Any]) -> Any:
        """A job's outcome, with a progress bar where somebody looks."""
        if not self.console.is_terminal:
            return job.wait(progress=False)
        with bar() as show:
            return self.studio._run(self.studio.client.wait(job.slug, None, show))

    def bring_in_model(self, model: str) -> ModelRecord:
        """Step 1."""
        self.heading("Language model")
        name = None if model != EMBEDDED else "embedded"
        record = self.wait(self.studio.get_model(source=model, name=name))
        self.say(
            f"{record.ref}: {record.family}, {record.n_layers} layers, d_model {record.d_model}, "
            f"{record.n_params:,} parameters, context {record.n_ctx}"
        )
        return record

    def bring_in_text(self, text: str | None, lm: ModelRecord) -> str:
        """Step 2."""
        self.heading("Text, tokenised")
        size = min(128, lm.n_ctx or 128)
        record = self.wait(
            self.studio.get_dataset(
                source=text or EMBEDDED, name=None if text else "corpus", model=lm.slug, context_size=size
            )
        )
        counted = self.studio.dataset_statistics(dataset=record.slug, tokens=record.tokens[-1])
        self.say(
            f"{record.ref}: {record.n_documents:,} documents, {counted.n_tokens:,} tokens in contexts of "
            f"{counted.context_size}, BOS: {counted.bos_policy}"
        )
        return record.tokens[-1]

    def _default_hook(self, model: str, lm: ModelRecord) -> str:
        if model == EMBEDDED:
            from mistudio_engine.demo.embedded import DEMO_HOOK

            return DEMO_HOOK
        return f"blocks.{lm.n_layers // 2}.hook_resid_post"

    def train(self, model: str, lm: ModelRecord, tokens: str, hook_name: str) -> SAERecord:
        """Step 3."""
        self.heading(f"A TopK SAE on {hook_name}")
        settings: dict[str, Any] = {"d_sae": 8 * lm.d_model, "k": 16, "n_tokens": N_TOKENS, "lr": 1e-3}
        if model == EMBEDDED:
            from mistudio_engine.demo.embedded import DEMO_SAE

            settings = dict(DEMO_SAE)
        job = self.studio.train_sae(model=lm.slug, dataset=tokens, hook_name=hook_name, seed=self.seed, **settings)
        sae = self.wait(job)
        rate = job.refresh().metrics.get("tokens_per_second")
        speed = f", {rate:,.0f} tokens/s" if rate else ""
        self.say(f"{sae.ref}: {sae.d_in} → {sae.d_sae} features, k = {sae.config.get('k')}{speed}")
        return sae

    def evaluate(self, sae: SAERecord) -> Evaluation:
        """Step 4."""
        self.heading("How good is it?")
        quality = self.wait(self.studio.eval_sae(sae=sae.slug, n_tokens=EVAL_TOKENS))
        self.say(
            f"FVU {quality.fvu:.3f} (0 is perfect), L0 {quality.l0:.1f}, CE-loss score {quality.ce_loss_score:.3f} "
            f"(1 is perfect), dead {quality.dead_fraction:.1%}"
        )
        return quality

    def concepts(self, sae: SAERecord) -> list[ConceptScore]:
        """Which of the corpus's known concepts the SAE has found, on text that nobody has trained on."""
        from mistudio_engine.demo.check import (
            check_concepts,  # the science needs torch, which the rest of this does not
        )

        scores = check_concepts(self.studio.client.home / sae.folder, sae.hook_name)
        for kind, counts in counted(scores).items():
            self.say(
                f"{kind} concepts on held-out text: {counts['single']} of {counts['n']} carried by one feature, "
                f"{counts['five']} by five (by the model itself: {counts['ceiling']})"
            )
        return scores

    def extract(self, sae: SAERecord) -> None:
        """Step 5."""
        self.heading("All features in one pass")
        record = self.wait(self.studio.extract(sae=sae.slug, n_tokens=EXTRACT_TOKENS))
        self.say(
            f"{record.n_features:,} features over {record.n_tokens:,} tokens: "
            f"{record.n_alive:,} alive, {record.n_dense:,} dense"
        )

    def label(self, sae: SAERecord) -> None:
        """Step 6."""
        self.heading("Labels without an LLM")
        report = self.wait(self.studio.label_features(sae=sae.slug))
        self.say(f"{report.n_labelled} labelled by token pattern, {report.n_failed} without a pattern that holds")
        for sample in report.samples[:3]:
            self.say(
                f"[dim]#{sample['feature']}[/dim] {_plain(sample['label'])} "
                f"[dim](balanced accuracy {sample['confidence']:.2f})[/dim]"
            )

    def search(self, sae: SAERecord, model: str) -> dict[str, Any]:
        """Step 7."""
        self.heading("Search")
        queries = ("feelings and moods", "sad") if model == EMBEDDED else ("a family member", "she")
        searched: dict[str, Any] = {}
        for mode, query in zip(("meaning", "text"), queries, strict=True):
            wanted = mode if mode == "text" or self.studio.status().embedder else "text"
            page = self.studio.search_features(query=query, sae=sae.slug, mode=wanted, limit=3)
            searched[mode] = {"query": query, "mode": page.mode, "hits": [row.ref for row in page.rows]}
            self.say(f"by {page.mode}: [italic]{query}[/italic]")
            for row in page.rows:
                self.say(f"  [dim]{row.ref}[/dim] {_plain(row.label or 'no label')} [dim]({row.score:.2f})[/dim]")
        return searched

    def steer_known(self, lm: ModelRecord, sae: SAERecord, scores: list[ConceptScore]) -> Steered:
        """Step 8 on the embedded model: along the feature of a known concept, from several neutral beginnings."""
        from mistudio_engine.demo.steering_case import steering_case

        case = steering_case()
        index = next(score.feature for score in scores if score.concept == case.concept)
        card = self.studio.get_feature(sae=sae.slug, index=index)
        self.heading(f"Steering along “{case.concept}”")
        results = [
            self.steer(
                lm, card, prompt, case.tokens, case.strength, case.unit, case.temperature, case.max_new_tokens, seed
            )
            for seed, prompt in enumerate(case.prompts, start=self.seed)
        ]
        return self._compared(card, f"words for {case.target}", results)

    def steer_found(self, lm: ModelRecord, sae: SAERecord, searched: dict[str, Any]) -> Steered:
        """Step 8 elsewhere: along the found feature that promotes its tokens most."""
        self.heading("Steering")
        card = self._strongest(sae, searched)
        tokens = tuple(each.token for each in (card.promoted or [])[:5])
        # About half the layer's typical norm is a useful strength (arXiv 2505.20063).
        result = self.steer(lm, card, OWN_PROMPT, tokens, 0.6, "norm", 0.0, 24, self.seed)
        return self._compared(card, "the tokens it promotes: " + ", ".join(map(repr, tokens)), [result])

    def steer(
        self,
        lm: ModelRecord,
        card: FeatureCard,
        prompt: str,
        tokens: tuple[str, ...],
        strength: float,
        unit: Literal["raw", "max_act", "norm"],
        temperature: float,
        max_new_tokens: int,
        seed: int,
    ) -> SteerResult:
        """One prompt, steered and not."""
        job = self.studio.steer(
            model=lm.slug,
            interventions=[Intervention(feature=card.ref, strength=strength, unit=unit)],
            prompt=prompt,
            concept_tokens=list(tokens),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        return job.wait(progress=False)

    def _strongest(self, sae: SAERecord, searched: dict[str, Any]) -> FeatureCard:
        """The found feature that promotes its tokens most: those steer best."""
        refs = [ref for found in searched.values() for ref in found["hits"]]
        cards = [
            self.studio.get_feature(sae=sae.slug, index=int(ref.rpartition("#")[2])) for ref in dict.fromkeys(refs)
        ]
        return max(cards, key=lambda card: card.promoted[0].value if card.promoted else 0.0)

    def _compared(self, card: FeatureCard, concept: str, results: list[SteerResult]) -> Steered:
        table = Table(show_header=True, box=None, padding=(0, 2, 0, 3))
        table.add_column("baseline", ratio=1)
        table.add_column(f"steered along {card.ref}", ratio=1)
        for result in results[:2]:
            table.add_row(Text(result.prompt + result.baseline[0].text), Text(result.prompt + result.steered[0].text))
        self.console.print(table)
        chances = [result.probability for result in results if result.probability is not None]
        before, after = fmean(each.before for each in chances), fmean(each.after for each in chances)
        control = fmean(each.control or 0.0 for each in chances)
        ratio = fmean(result.steered[0].perplexity or 0.0 for result in results) / fmean(
            result.baseline[0].perplexity or 1.0 for result in results
        )
        self.say(
            f"probability of {_plain(concept)}: {before:.3f} → {after:.3f} ({after / max(before, 1e-12):.1f}×); "
            f"along random features of the same length: {control:.3f}"
        )
        self.say(f"perplexity under the unsteered model: {ratio:.2f}× the baseline's, over {len(results)} prompts")
        steered = {"concept": concept, "before": before, "after": after, "control": control}
        return Steered(card, {**steered, "perplexity_ratio": ratio})

    def show(self, card: FeatureCard) -> None:
        """Step 9."""
        self.heading(f"One feature: {card.ref}")
        self.say(f"label: {_plain(card.label or 'none')}")
        if card.activation_frequency is not None:
            self.say(f"fires on {card.activation_frequency:.2%} of tokens, at most {card.max_activation:.2f}")
        if card.promoted:
            self.say("promotes: " + _plain(", ".join(repr(each.token) for each in card.promoted[:6])))
        for example in (card.examples or [])[:4]:
            self.console.print(Text("   ").append_text(_shaded(example, card.max_activation or 1.0)))

    def export(self, sae: SAERecord) -> str:
        """Step 10."""
        self.heading("Export")
        record = self.wait(self.studio.export(sae=sae.slug))
        self.say(f"{record.output_path} ({record.file_size_bytes / 1e6:.1f} MB, sha256 {record.sha256[:12]}…)")
        return record.output_path


def _plain(text: str) -> str:
    """Without rich's markup: labels hold words of a dataset."""
    return text.replace("[", r"\[")


def _shaded(example: Example, maximum: float) -> Text:
    """Tokens on a background as strong as the activation; the prime token underlined."""
    line = Text()
    for place, (token, value) in enumerate(zip(example.tokens, example.values, strict=True)):
        share = min(max(value / maximum, 0.0), 1.0)
        style = ""
        if share > 0.02:
            # From pale to strong orange: dark text on it stays readable on any terminal.
            green, blue = round(235 - 120 * share), round(205 - 185 * share)
            style = f"black on rgb(255,{green},{blue})"
        line.append(token.replace("\n", "⏎"), style=f"{style} underline" if place == example.position else style)
    return line


def _farewell(console: Console, result: dict[str, Any], home: Path, url: str | None) -> None:
    console.print(f"\n[bold green]Done[/bold green] in {result['seconds']:.0f} s. All of it is in {home}.")
    if url:
        console.print(f"The engine goes on at {url}; stop it with [bold]mistudio engine stop[/bold].")
    has_lab = importlib.util.find_spec("jupyterlab") is not None
    lab = "jupyter lab" if has_lab else _plain('pip install "mistudio[lab]" && jupyter lab')
    console.print(
        f"Next, in JupyterLab:   [bold]{lab}[/bold], then  "
        "[bold]from mistudio_engine import connect; studio = connect()[/bold]\n"
        "Next, with an agent:   [bold]mistudio mcp install claude-code[/bold], then ask it: "
        f"“what does {result['sae']} know about feelings?”"
    )
