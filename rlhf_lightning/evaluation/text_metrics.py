"""Text compared with reference texts."""

from collections.abc import Sequence


def rouge_l(responses: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L F measure of each response with the nearest of its references (Lin 2004), 0 to 1.

    Words are runs of a-z and 0-9 after lowering, as in the original: a text in another script scores 0. Raises
    `ValueError` where a response has no reference.
    """
    # Slow to import.
    from torchmetrics.text.rouge import ROUGEScore

    for number, texts in enumerate(references):
        if not texts:
            raise ValueError(f"response {number} has no reference to be compared with")
    # rougeLsum would ask for sentence splitting data from the network; rougeL needs none.
    metric = ROUGEScore(rouge_keys="rougeL", accumulate="best")
    return [
        float(metric([response], [list(texts)])["rougeL_fmeasure"])
        for response, texts in zip(responses, references, strict=True)
    ]
