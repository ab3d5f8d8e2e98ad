"""Search for hyperparameters from Python or a notebook: the same study as `lightning-bge hpo`, with the same results.

lightning-bge sample runs/sample
python examples/tune_from_python.py
"""

from __future__ import annotations

from optuna.distributions import CategoricalDistribution, FloatDistribution

from lightning_bge import BGEClassifier, TextDataModule, tune
from lightning_bge.tuning import TuneResult


def main(
    model_name: str = "runs/sample/model",
    train_file: str = "runs/sample/train.csv",
    run_dir: str = "runs/tune_from_python",
    n_trials: int = 12,
) -> TuneResult:
    model = BGEClassifier(model_name)
    data = TextDataModule(
        model_name,
        train_file=train_file,
        text_columns=["text", "criterion"],
        group_column="post_id",
        split={"folds": 3},
    )
    space = {
        "model.optimizer.lr": FloatDistribution(1e-4, 1e-2, log=True),
        "data.batch_size": CategoricalDistribution([16, 32]),
    }
    return tune(model, data, space, run_dir=run_dir, n_trials=n_trials, max_epochs=3)


if __name__ == "__main__":
    result = main()
    print(result.best_params, result.best_value)
    print("exported model:", result.model_dir)
