"""Finds losses by the names of papers and methods: `ReviewKD` is `hcl_loss`, `attention` is attention transfer."""

from __future__ import annotations

import re
from collections.abc import Mapping

# other names of the losses, their papers and their uses; a loss that is missing here is found by its docstring
OTHER_NAMES = {
    "ab_loss": "hidden neurons rectifier",
    "alpha_beta_loss": "abkd hellinger f divergence",
    "attention_transfer_loss": "at attention maps spatial",
    "bce_loss": "binary cross entropy multi label",
    "correlation_loss": "cc cckd congruence rbf",
    "cosine_loss": "distilbert direction hidden states",
    "crcd_loss": "memory bank nce infonce contrastive",
    "crd_loss": "memory bank nce infonce contrastive",
    "cwd_loss": "segmentation detection dense prediction spatial softmax",
    "dcn_loss": "center centre norm direction kd++",
    "difference_kl_loss": "diff diffkld pairs",
    "dino_loss": "dinov2 dinov3 self distillation self supervised ema centering",
    "dist_loss": "pearson inter intra",
    "dkd_loss": "tckd nckd",
    "euclidean_mse_loss": "eu mse pairwise distances",
    "factor_transfer_loss": "ft paraphraser translator",
    "fsp_loss": "gram matrix gift",
    "gram_loss": "dinov3 gram anchoring patches",
    "hcl_loss": "reviewkd review kd knowledge review abf connectors pyramid",
    "ibot_loss": "dinov2 masked image modelling modeling patches",
    "instance_graph_loss": "irg irgkd",
    "jsd_loss": "gkd generalized generalised js jensen shannon on policy",
    "kl_loss": "hinton vanilla kd kld soft targets soft labels logits cross entropy",
    "koleo_loss": "dinov2 entropy uniformity kozachenko leonenko",
    "linear_jsd_loss": "fused chunked liger large vocabulary memory",
    "linear_kl_loss": "fused chunked liger large vocabulary memory",
    "make_loss": "several weighted combined mixture multiple",
    "minilm_loss": "attention transformer bert tokens",
    "mse_loss": "fitnet fitnets hint hints l2 squared error regression",
    "nkd_loss": "normalized",
    "nst_loss": "mmd maximum mean discrepancy",
    "pkt_loss": "probabilistic",
    "reverse_kl_loss": "rkl minillm mode seeking",
    "rkd_loss": "relational angle angles triplet triples",
    "sampled_kl_loss": "k1 k2 k3 policy gradient score reinforce vllm serving log probabilities on policy",
    "similarity_loss": "sp spkd similarity preserving",
    "sinkhorn_knopp": "swav optimal transport prototypes assignments",
    "skew_kl_loss": "distillm skl skewed",
    "skew_reverse_kl_loss": "distillm srkl skewed",
    "smooth_l1_loss": "huber l1 regression",
    "standardize_logits": "logit standardization standardisation z score zscore",
    "symmetric_kl_loss": "jeffreys skld j divergence",
    "taid_loss": "temporally adaptive interpolated curriculum",
    "topk_kl_loss": "top k sparse logits stored cached recorded",
    "tvd_loss": "total variation l1",
    "uld_loss": "tokenizer tokenizers tokeniser vocabulary vocabularies wasserstein optimal transport gold cross tokenizer",
    "uskd_loss": "self kd without teacher teacher free zipf",
    "vid_loss": "mutual information variational",
}
EVERYWHERE = {
    "distillation",
    "distill",
    "kd",
    "knowledge",
    "loss",
    "losses",
    "the",
    "of",
    "for",
    "a",
    "and",
    "by",
    "with",
}


def by_meaning(asked: str, docstrings: Mapping[str, str]) -> list[str]:
    """The best matches, at most three: the names whose other names, summaries or papers contain all of the words.

    Args:
        asked: the words to look for.
        docstrings: the docstring of each name.
    """
    words = _words(asked)
    words = [word for word in words if word not in EVERYWHERE] or words
    scores = {}
    for name, docstring in docstrings.items():
        summary, *rest = docstring.split("\n\n")
        cited = " ".join(text.partition("https://")[0] for text in rest if "https://" in text)
        places = [(8, OTHER_NAMES.get(name, "")), (6, name), (4, summary), (1, cited)]
        found = [max(weight * _holds(word, _words(text)) for weight, text in places) for word in words]
        scores[name] = sum(found) if all(found) else 0.0
    best = max(scores.values())
    return sorted((name for name in scores if scores[name] > best / 2), key=lambda name: -scores[name])[:3]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold().replace("_", " "))


def _holds(word: str, words: list[str]) -> float:
    """1 for the word itself, half for a word that starts with it or that it starts with, such as a plural."""
    if word in words:
        return 1.0
    return 0.5 * any(min(len(word), len(x)) > 3 and (x.startswith(word) or word.startswith(x)) for x in words)
