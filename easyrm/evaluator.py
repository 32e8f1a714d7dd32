"""What a run asks of its model while it trains: the pairs of --data.eval and the suites of --eval.suites."""

from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from easyrm import __version__
from easyrm.config import RunConfig
from easyrm.data.packing import RowBatch
from easyrm.data.tokenizer import Tokenizer
from easyrm.errors import InputError
from easyrm.evaluation_files import HELD_OUT, SHARES, evaluations_of, write_evaluation
from easyrm.scoring.evaluation import Evaluation, judge, read_questions
from easyrm.scoring.scorer import Scorer
from easyrm.suites import pairs
from easyrm.suites.item import Answer
from easyrm.suites.registry import parse_suites
from easyrm.training.evaluation import METRICS, Evaluated, evaluate
from easyrm.training.inputs import Inputs


class Evaluator:
    """Evaluates a model of `config`'s run; false where nothing was asked for.

    Questions are read and tokenized here, once. Nothing of the training is touched: neither its state nor its data.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: epath.Path,
        inputs: Inputs,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        row_groups: int,
        say: Callable[[str], None],
    ):
        """Raises InputError for a suite that cannot be read, and a --best_metric that no evaluation gives."""
        self._config, self._directory, self._inputs, self._tokenizer = config, directory, inputs, tokenizer
        self._vocab_size, self._row_groups, self._say = vocab_size, row_groups, say
        requests = parse_suites(config.eval.suites, taken=(HELD_OUT,))
        figures = [*METRICS] if inputs.eval else []
        figures += [
            f"eval/{request.name}/{figure}"
            for request in requests
            for figure in SHARES[request.suite]
            if not figure.startswith("interval")
        ]
        if (config.keep_best or config.eval.patience) and config.best_metric not in figures:
            raise InputError(f"--best_metric={config.best_metric} is not evaluated; choose one of {', '.join(figures)}")
        limit = config.data.max_length
        self._suites = [read_questions(request, tokenizer, limit, vocab_size, say) for request in requests]
        if config.eval_freq and not self:
            say(f"note: --eval_freq={config.eval_freq} without --data.eval or --eval.suites: nothing is evaluated")

    def __bool__(self) -> bool:
        return bool(self._inputs.eval or self._suites)

    def fingerprints(self) -> dict[str, str]:
        """What names the tokens of each suite."""
        return {f"eval.suites {suite.request.name}": suite.fingerprint for suite in self._suites}

    def __call__(
        self, rewards_of: Callable[[RowBatch], tuple[jax.Array, jax.Array]], step: int, stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        """The figures of all evaluations under their keys in metrics.jsonl; None where `stop` ended them.

        `rewards_of` gives the rewards of both sides of each slot. The files of the step are written by process 0.
        """
        figures, found = {}, []
        if self._inputs.eval:
            held_out = evaluate(rewards_of, self._inputs.eval(self._inputs.eval_order()), self._config.loss, stop)
            if held_out is None:
                return None
            figures |= held_out.figures
            if not self._config.loss.ranked:
                found.append(self._of_pairs(held_out, step))
        scorer = Scorer(
            name=str(self._directory),
            rewards_of=rewards_of,
            tokenizer=self._tokenizer,
            vocab_size=self._vocab_size,
            max_length=self._config.data.max_length,
            row_groups=self._row_groups,
            batch_tokens=max(shape.capacity for shape in self._inputs.train.shapes) // self._config.data.micro_batches,
            step=step,
        )
        for suite in self._suites:
            judged = judge(suite, scorer, self._config.dtype, stop)
            if judged is None:
                return None
            figures |= {f"eval/{suite.request.name}/{name}": value for name, value in judged.report["figures"].items()}
            found.append(judged)
        if jax.process_index() == 0:
            self._write(found, step)
        best = self._config.best_metric
        if (self._config.keep_best or self._config.eval.patience) and best not in figures:
            self._say(f"warning: no {best} at step {step}: no record counts for it, and this step cannot be the best")
        return figures

    def _write(self, found: list[Evaluation], step: int) -> None:
        try:
            for evaluation in found:
                write_evaluation(evaluations_of(self._directory, step), *evaluation)
        except Exception as error:  # a bucket's client has errors of its own
            self._say(f"warning: the evaluations of step {step} are not written ({error}); their figures are logged")

    def _of_pairs(self, found: Evaluated, step: int) -> Evaluation:
        """The pairs of --data.eval as an evaluation."""
        store = self._inputs.eval.store
        chosen, prompt, rejected = store.lengths(np.arange(len(store))).T
        lengths = (chosen + prompt).tolist(), (prompt + rejected).tolist()
        names = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
        sides = (found.chosen.tolist(), found.rejected.tolist(), *lengths)
        answers = [Answer(None, "", (chosen,), (rejected,)) for chosen, rejected in zip(*sides[:2], strict=True)]
        report = {
            "suite": "pairs",
            "name": HELD_OUT,
            "source": self._config.data.eval,
            "step": step,
            "model": str(self._directory),
            "evaluator": f"easyrm {__version__}",
            "dtype": self._config.dtype,
            "max_length": self._config.data.max_length,
            "fingerprint": store.fingerprint,
            "read": store.report["read"],
            "scored": len(store),
            "dropped": store.report["dropped"],
            "figures": pairs.figures(answers),
            "subsets": {},
        }
        return Evaluation(report, [dict(zip(names, values, strict=True)) for values in zip(*sides, strict=True)])
