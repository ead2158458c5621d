from parity.oracle._plain import constant, norm, unit


def euclidean_mse_loss(student, teacher):
    s, t = [unit(x) for x in student], [unit(constant(x)) for x in teacher]
    number = len(s)
    return [sum((norm(s[i] - s[j]) - norm(t[i] - t[j])) ** 2 for j in range(number)) / number for i in range(number)]
