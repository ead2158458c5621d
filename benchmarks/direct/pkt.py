from torch import Tensor


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    probabilities = []
    for x in (student, teacher):
        x = x / (x.norm(dim=1, keepdim=True) + 1e-7)
        similarity = (x @ x.T + 1) / 2
        probabilities.append(similarity / similarity.sum(1, keepdim=True))
    p, q = probabilities
    return (q * ((q + 1e-7) / (p + 1e-7)).log()).mean()
