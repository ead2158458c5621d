"""Modules with a state under the frameworks' transformations: the state is updated in place, as in plain calls."""

import contextlib
import copy
import functools
import io
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from flax.errors import TraceContextError
from frameworks import BOTH, JAX, TORCH
from tiers import first, only, slow

import kdjax.nn
import kdtorch.nn

pytestmark = pytest.mark.usefixtures("quick_compilation")
RNG = np.random.default_rng(0)
ROWS, MAPS = RNG.normal(size=(6, 4)), [RNG.normal(size=(3, 2, 8, 8)), RNG.normal(size=(3, 3, 4, 4))]
INDEX, CLASSES = np.arange(6), np.arange(6) % 3
NEGATIVES = RNG.integers(20, size=(6, 5))


def halved(epoch):
    return 0.5**epoch


def build(f, name):
    nn, rngs = (kdjax.nn, {"rngs": nnx.Rngs(0)}) if f is JAX else (kdtorch.nn, {})
    torch.manual_seed(0)
    if name == "dino":
        return nn.DINOLoss(4)
    if name == "ibot":
        return nn.IBOTLoss(2)
    if name in ("crcd", "crd"):
        return getattr(nn, f"{name.upper()}Loss")(4, 4, 4, 20, num_negatives=5, **rngs)
    if name == "review":
        return nn.ReviewKD([2, 3], [4, 5], 4, out_shapes=[7, (3, 2)], **rngs)
    if name == "connector":
        return nn.ABF(2, 4, 5, False, **rngs)
    if name == "projector":
        return nn.Projector(2, 4, batch_norm=True, **rngs)
    return f.kd.make_loss(
        {"MODEL": {"METRIC_LOSS_TYPE": "kd-dino-crcd-dcn-dkd", "KD_LOSS_WEIGHT": [1.0, halved, 1.0, 2], "FEAT_DIM": 4}},
        3,
        20,
    )


def caller(f, name):
    """A function that calls the module with an array `[6, 4]`."""
    index, classes, negatives = (f.array(x) for x in (INDEX, CLASSES, NEGATIVES))
    maps = [f.array(np.moveaxis(x, 1, -1) if f is JAX else x, "float32") for x in MAPS]

    def call(module, x):
        if name == "dino":
            return module(x, 2 * x, epoch=3)
        if name == "ibot":
            patches = x.reshape(-1, 2, 2)
            return module(patches, 2 * patches, patches[:, :, 0] > -1, epoch=3)
        if name in ("crcd", "crd"):
            return module(x, 2 * x, index, negatives)
        if name == "review":
            return sum((y * y).mean() for y in module([x[0, 0] * y for y in maps]))
        if name == "connector":
            return (module(x[0, 0] * maps[0])[0] ** 2).mean()
        if name == "projector":
            return (module(x[0, 0] * maps[0]) ** 4).mean()
        feat = {"stu": x, "tea": 2 * x, "index": index, "score_stu": x[:, :3], "score_tea": x[:, 1:]}
        return module(feat=feat, target=classes, epoch=3)

    return call


NAMES = ["dino", "ibot", "crcd", "crd", "review", "connector", "projector", "mixture"]
all_modules = pytest.mark.parametrize("name", NAMES)
X = {"jax": JAX.array(ROWS, "float32"), "torch": TORCH.array(ROWS, "float32")}


def variables(module):
    """The Variables of the state by path, and their values as NumPy arrays."""
    kinds = (kdjax.nn.LossState, nnx.BatchStat)
    return {".".join(map(str, path)): x for path, x in nnx.iter_graph(module) if isinstance(x, kinds)}


def numbers(states):
    def number(x):
        x = x[...] if isinstance(x, nnx.Variable) else x.detach().numpy()
        return np.array(jax.random.key_data(x) if "key" in str(x.dtype) else x)

    return {name: number(x) for name, x in states.items()}


def moved(now, before):
    """Whether everything has changed, except the normalisers, which the first step sets."""
    return all((now[k] != before[k]).any() for k in before if not ("normalizer" in k and before[k].all()))


def same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-4, atol=1e-6, err_msg=name)


# in JAX: the number of steps, and the function that takes them

LOOPS = {
    "jit": (1, lambda call, m, x: nnx.jit(call)(m, x)),
    "grad": (1, lambda call, m, x: nnx.jit(nnx.grad(call, argnums=1))(m, x)),
    "value_and_grad": (1, lambda call, m, x: nnx.jit(nnx.value_and_grad(call))(m, x)),
    "remat": (1, lambda call, m, x: nnx.jit(nnx.grad(nnx.remat(call), argnums=1))(m, x)),
    "cond": (1, lambda call, m, x: nnx.jit(nnx.cond, static_argnums=(1, 2))(True, call, idle, m, x)),
    "other branch": (0, lambda call, m, x: nnx.jit(nnx.cond, static_argnums=(1, 2))(False, call, idle, m, x)),
    "switch": (1, lambda call, m, x: nnx.switch(1, [idle, call], m, x)),
    "while_loop": (
        3,
        lambda call, m, x: nnx.while_loop(lambda c: c[1] < 3, lambda c: (call(c[0], x), (c[0], c[1] + 1))[1], (m, 0)),
    ),
    "fori_loop": (3, lambda call, m, x: nnx.fori_loop(0, 3, lambda i, c: (call(*c), c)[1], (m, x))),
    "scan": (
        3,
        lambda call, m, x: nnx.scan(
            lambda m, x: (m, call(m, x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0)
        )(m, jnp.stack([x] * 3)),
    ),
    "scan of a state": (
        3,
        lambda call, m, x: nnx.scan(call, in_axes=(nnx.StateAxes({...: nnx.Carry}), 0), out_axes=0)(m, jnp.stack([x] * 3)),
    ),
    "cached_partial": (3, lambda call, m, x: [step(x) for step in [nnx.cached_partial(nnx.jit(call), m)] * 3]),
    "eager": (2, lambda call, m, x: [call(m, x), call(m, x)]),
}  # fmt: skip


def idle(module, x):
    return jnp.zeros_like(x[0, 0])


@pytest.mark.slow
@all_modules
@pytest.mark.parametrize("loop", LOOPS)
def test_transforms_of_flax(name, loop):
    call, module, plain = caller(JAX, name), build(JAX, name), build(JAX, name)
    before = variables(module)
    start = numbers(before)
    steps, run = LOOPS[loop]
    run(call, module, X["jax"])
    for _ in range(steps):
        nnx.jit(call)(plain, X["jax"])
    after = variables(module)
    assert all(after[k] is before[k] for k in before), "a Variable was replaced"
    same(numbers(after), numbers(variables(plain)))
    assert moved(numbers(after), start) if steps else not moved(numbers(after), start)


@pytest.mark.parametrize("name", only("dino".__eq__, NAMES))
@pytest.mark.parametrize("options", [{"copy": True}, {}], ids=["copy", "no copy"])
def test_merged_inside_grad(name, options):
    """With a state from outside: the merged module has its own Variables inside, and returns its state."""
    call, module, plain = caller(JAX, name), build(JAX, name), build(JAX, name)
    graph, state = nnx.split(module)
    start = numbers(variables(module))

    @jax.jit
    def step(x):
        def objective(x):
            merged = nnx.merge(graph, state, **options)
            return call(merged, x), nnx.state(merged)

        return jax.value_and_grad(objective, has_aux=True)(x)

    (_, moved), _ = step(X["jax"])
    same(numbers(variables(module)), start)
    nnx.update(module, moved)
    nnx.jit(call)(plain, X["jax"])
    same(numbers(variables(module)), numbers(variables(plain)))


@pytest.mark.parametrize(
    ("transform", "name"),
    first(1, [(jax.jit, "dino"), (nnx.grad, "dino"), (jax.vmap, "dino"), *((jax.grad, name) for name in NAMES)]),
)
def test_a_module_from_outside_of_a_transformation(transform, name):
    """It raises an error that says what to write instead; it works in eval mode, and with another view of the
    module."""
    call, module = caller(JAX, name), build(JAX, name)
    x = jnp.stack([X["jax"]]) if transform is jax.vmap else X["jax"]
    start = numbers(variables(module))
    with pytest.raises(
        TraceContextError, match=r"the state of \w+ cannot be updated here, .*nnx.merge\(..., copy=True\)"
    ):
        transform(lambda x: call(module, x))(x)
    same(numbers(variables(module)), start)
    still = nnx.view(module, use_running_average=True)
    jax.jit(transform(lambda x: call(still, x)))(x)
    module.eval()
    jax.jit(transform(lambda x: call(module, x)))(x)
    same(numbers(variables(module)), start)
    module.train()
    nnx.jit(call)(module, X["jax"])
    assert moved(numbers(variables(module)), start)


@pytest.mark.parametrize("name", only("dino".__eq__, NAMES))
def test_plain_jit_drops_the_state(name):
    """As the documentation warns: a module is a pytree, and plain `jax.jit` drops changes of its arguments."""
    call, module = caller(JAX, name), build(JAX, name)
    start = numbers(variables(module))
    jax.jit(call)(module, X["jax"])
    same(numbers(variables(module)), start)


@slow
def test_an_ensemble_in_jax():
    """Three memories at the same time, each with its own batches."""
    call, x = caller(JAX, "crcd"), jax.random.normal(jax.random.key(0), (3, 6, 4), "float32")

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def create(rngs):
        return kdjax.nn.CRCDLoss(4, 4, 4, 20, num_negatives=5, rngs=rngs)

    module = create(nnx.Rngs(0))
    start = numbers(variables(module))
    assert nnx.vmap(call)(module, x).shape == (3,)
    assert moved(numbers(variables(module)), start)


@slow
@all_modules
def test_copies_in_jax(name):
    call, module = nnx.jit(caller(JAX, name)), build(JAX, name)
    call(module, X["jax"])
    for twin in (copy.deepcopy(module), nnx.clone(module), nnx.merge(*nnx.split(module))):
        held = numbers(variables(twin))
        same(held, numbers(variables(module)))
        call(twin, X["jax"])
        assert moved(numbers(variables(twin)), held)


# in PyTorch: each use takes one step


class Called(torch.nn.Module):
    """A module with a single input, after a student with one weight."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.call(self.module, self.weight * x)


def buffers(module):
    return {name: x for name, x in module.named_buffers() if x.is_floating_point()}


def compiled(call, module, x):
    torch._dynamo.reset()
    torch.compile(lambda x: call(module, x), fullgraph=True, backend="aot_eager")(x).backward()


def exported(call, module, x):
    program = torch.export.export(Called(module, call), (x.detach(),)).module()
    program(x.detach())
    with torch.no_grad():
        for name, held in buffers(module).items():
            held.copy_(dict(program.named_buffers())[f"module.{name}"])


def replicated(call, module, x):
    """Like DataParallel on its first device: another module with the same tensors as its attributes."""

    def replica(module):
        copied = module._replicate_for_data_parallel()
        copied.__dict__.update(module._parameters)
        copied._modules = {name: part and replica(part) for name, part in module._modules.items()}
        return copied

    call(replica(module), x).backward()


def functional(call, module, x):
    given = {f"module.{name}": held for name, held in module.named_buffers()}
    torch.func.functional_call(Called(module, call), given, (x,)).backward()


def differentiated(call, module, x):
    """The buffers are arguments, because inside `torch.func.grad` no other tensor can be changed."""
    given = {f"module.{name}": held for name, held in module.named_buffers()}
    torch.func.grad(lambda x, given: torch.func.functional_call(Called(module, call), given, (x,)))(x.detach(), given)


def parallel(call, module, x):
    with group_of_one():
        torch.nn.parallel.DistributedDataParallel(Called(module, call))(x).backward()


def sharded(call, module, x):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with group_of_one():
        policy = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=False)
        wrapped = fully_shard(Called(module, call), mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
        wrapped(x).backward()


@contextlib.contextmanager
def group_of_one():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def in_inference_mode(call, module, x):
    with torch.inference_mode():
        call(module, x)


def under_autocast(call, module, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call(module, x).backward()


USES = {
    "eager": lambda call, module, x: call(module, x).backward(),
    "no_grad": torch.no_grad()(lambda call, module, x: call(module, x)),
    "inference_mode": in_inference_mode,
    "autocast": under_autocast,
    "compile": compiled,
    "export": exported,
    "DataParallel": replicated,
    "DistributedDataParallel": parallel,
    "fully_shard": sharded,
    "functional_call": functional,
    "func.grad": differentiated,
    "share_memory": lambda call, module, x: call(module.share_memory(), x).backward(),
}


@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
@all_modules
@pytest.mark.parametrize("use", USES)
def test_uses_of_modules_in_torch(name, use):
    call, module, plain = caller(TORCH, name), build(TORCH, name), build(TORCH, name)
    before, start = buffers(module), numbers(buffers(module))
    for step, stepped in ((USES[use], module), (USES["eager"], plain)):
        torch.manual_seed(1)  # for the negatives
        step(call, stepped, X["torch"].clone().requires_grad_())
    after = buffers(module)
    assert all(after[k] is before[k] for k in before), "a buffer was replaced"
    if use != "autocast" or name == "dino":  # the heads are rounded
        same(numbers(after), numbers(buffers(plain)))
    assert moved(numbers(after), start)
    if use != "fully_shard":  # its process group has ended
        call(module, X["torch"].clone().requires_grad_()).backward()


@all_modules
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: saved(x)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_in_torch(name, copied):
    """After a step with autograd, a copy shares nothing with the original."""
    call, module = caller(TORCH, name), build(TORCH, name)
    call(module, X["torch"].clone().requires_grad_())
    twin, start = copied(module), numbers(buffers(module))
    same(numbers(buffers(twin)), start)
    call(twin, X["torch"])
    same(numbers(buffers(module)), start)
    assert moved(numbers(buffers(twin)), start)


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", ["dino", "crcd", "crd", "mixture"])
@pytest.mark.parametrize("cast", ["bfloat16", "half", "to", "type"])
def test_half_precision_leaves_the_state(name, cast):
    call, module = caller(TORCH, name), build(TORCH, name)
    call(module, X["torch"])
    before, start = buffers(module), numbers(buffers(module))
    getattr(module, cast)(*([torch.bfloat16] if cast in ("to", "type") else []))
    assert all(after is before[k] and after.dtype == torch.float32 for k, after in buffers(module).items())
    same(numbers(buffers(module)), start)
    assert all(x.dtype.itemsize == 2 for x in module.parameters())
    call(module, X["torch"].to(torch.bfloat16).requires_grad_()).backward()
    module.double()
    assert {x.dtype for x in buffers(module).values()} == {torch.float64}
    call(module, X["torch"].double())


@pytest.mark.parametrize("name", ["dino", "crcd", "crd"])
def test_an_ensemble_in_torch(name):
    call = caller(TORCH, name)
    modules = [build(TORCH, name) for _ in range(3)]
    parameters, states = torch.func.stack_module_state([Called(module, call) for module in modules])
    start = numbers(states)
    base = Called(modules[0], call)
    x = torch.stack([X["torch"], 2 * X["torch"], -X["torch"]])
    values = torch.vmap(lambda *state: torch.func.functional_call(base, state[:2], state[2:]))(parameters, states, x)
    for i, module in enumerate(modules):
        assert torch.allclose(call(module, x[i]), values[i], rtol=1e-4)
        same({k: y[i] for k, y in numbers(states).items()}, numbers(buffers(Called(module, call))))
    assert moved(numbers(states), start)


@pytest.mark.parametrize("name", ["CRCDLoss", "CRDLoss"])
def test_no_step_copies_the_memories(name):
    """A step writes only the rows of the batch, out of 4,000."""
    module = getattr(kdtorch.nn, name)(4, 4, 64, 4000, num_negatives=5)
    x = torch.randn(6, 4)
    module(x, x, torch.arange(6))  # sets the normaliser
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        module(x, x, torch.arange(6)).backward()
    sizes = [x.nbytes() for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
    assert max(sizes) < 4 * 4000 * 64 / 4


# in both


@pytest.mark.parametrize("f", BOTH, ids=lambda f: f.name)
@pytest.mark.parametrize("name", first(1, ["dino", "crcd", "crd", "mixture"]))
def test_update_false_leaves_the_state(f, name):
    module, call = build(f, name), caller(f, name)
    states = (
        (lambda: {k: x for k, x in variables(module).items() if "key" not in k})
        if f is JAX
        else lambda: buffers(module)
    )
    start = numbers(states())
    value = call(functools.partial(module, update=False), X[f.name])
    same(numbers(states()), start)
    again = call(module, X[f.name])
    if name != "mixture":  # it draws new negatives
        np.testing.assert_allclose(f.numpy(again), f.numpy(value), rtol=1e-5)
    assert moved(numbers(states()), start)


@pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)
def test_a_mask_of_stacked_views(f):
    """A mask that is stacked like the batch: an example is kept if all its views are, and masked ones may hold NaN."""
    module, x = build(f, "dino"), RNG.normal(size=(8, 4))
    rows = np.array([True, True, False, True, True, True, True, False])
    broken = np.where(rows[:, None], x, np.nan)
    got = module(f.array(broken, "float32"), f.array(broken, "float32"), where=f.array(rows))
    kept = np.array([0, 1, 4, 5])
    want = build(f, "dino")(f.array(x[kept], "float32"), f.array(x[kept], "float32"))
    np.testing.assert_allclose(f.numpy(got), f.numpy(want), rtol=1e-5)
    each = build(f, "dino")(*f.arrays([x, x], "float32"), where=f.array(rows[:4] & rows[4:]), reduction="none")
    assert each.shape == (4,)
