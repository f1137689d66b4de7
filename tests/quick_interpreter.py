"""Makes Triton 3.6's interpreter three times as fast; every result stays the same, bit by bit (test_interpreter.py).

Its time goes into bookkeeping, not into numbers: each call of a device function looks through the whole of triton.language
for functions to replace, each operation builds shapes and tables anew. What is remembered here depends on its key alone.
"""

import builtins
import inspect

import numpy as np


def quicken_interpreter() -> None:
    """Does nothing without triton, with another version than 3.6, or a second time."""
    try:
        import triton
        from triton.runtime import interpreter
    except ImportError:
        return
    if not triton.__version__.startswith("3.6.") or getattr(interpreter, "_fastlm_quick", False):
        return
    interpreter._fastlm_quick = True
    _replace_once_a_launch(interpreter)
    _remember_shapes(interpreter.tl.core)
    _leave_out_what_is_thrown_away(interpreter)
    _remember_dtypes(interpreter)


def _leave_out_what_is_thrown_away(interpreter) -> None:
    """Each int32 sum, difference and product is done again in int64, for an assertion that is made in debug mode only."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def _replace_once_a_launch(interpreter) -> None:
    """A launch replaces triton.language's functions and puts them back at its end. A device function replaces only what the
    launch has not, and what there is to replace is looked for once."""
    tl, semantic = interpreter.tl, interpreter.interpreter_semantic
    plain_patch, modules_of, found, launches = interpreter._patch_lang, {}, {}, []

    def patch_attr(obj, name, member, builder, scope):
        def replacement(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return member(*args, **kwargs)

        scope.set_attr(obj, name, replacement)

    def modules_seen_by(fn):
        namespace = fn.__globals__
        if id(namespace) not in modules_of:
            seen = {v for v in namespace.values() if inspect.ismodule(v) and v in (tl, tl.core)}
            modules_of[id(namespace)] = frozenset(seen), namespace  # kept, so that its id stays its own
        return modules_of[id(namespace)][0]

    class Launch(interpreter._LangPatchScope):
        """What one launch has replaced."""

        def __init__(self):
            super().__init__()
            self.modules = frozenset()
            launches.append(self)

        def replace_what_is_seen_by(self, fn):
            modules = modules_seen_by(fn)
            if modules and modules <= self.modules:
                return
            key = (self.modules, modules)
            if key not in found:
                scope = plain_patch(fn)
                found[key] = [(obj, name, obj.__dict__[name]) for obj, name, _ in scope._changes]
                self._changes += scope._changes
            else:
                for change in found[key]:
                    self.set_attr(*change)
            self.modules |= modules

        def restore(self):
            launches.remove(self)
            super().restore()

    def patch_lang(fn):
        launch = Launch()
        launch.replace_what_is_seen_by(fn)
        return launch

    def call(self, *args, **kwargs):
        if launches:
            launches[-1].replace_what_is_seen_by(self.fn)
        else:
            plain_patch(self.fn)
        fn = self.rewrite()
        try:
            return fn(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter._patch_attr, interpreter._patch_lang = patch_attr, patch_lang
    interpreter.InterpretedFunction.__call__ = call


def _remember_shapes(core) -> None:
    """Shapes are built once per sizes: of types (tuples of int) and of tensors (tuples of constexpr), which nobody changes."""
    plain_type, plain_equal = core.block_type.__init__, core.tuple.__eq__
    of_types, of_tensors = {}, {}

    def type_init(self, element_ty, shape):
        sizes = builtins.tuple(s.value if isinstance(s, core.constexpr) else s for s in shape)
        key = (sizes, element_ty.name)
        if key not in of_types:
            plain_type(self, element_ty, shape)
            of_types[key] = self.shape, self.numel, self.name
        else:
            self.element_ty = element_ty
            self.shape, self.numel, self.name = of_types[key]

    def tensor_init(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        sizes = builtins.tuple(type.shape.values) if type.is_block() else ()
        if sizes not in of_tensors:
            numel = int(np.prod(sizes, dtype=object)) if sizes else 1
            of_tensors[sizes] = core.tuple([core.constexpr(s) for s in sizes]), core.constexpr(numel)
        self.shape, self.numel = of_tensors[sizes]

    def equal(self, other):
        values = other.values if isinstance(other, core.tuple) else other
        if not isinstance(values, (list, builtins.tuple)):
            return plain_equal(self, other)
        if builtins.any(isinstance(v, (list, builtins.tuple, core.tuple)) for v in values):
            return plain_equal(self, other)
        return core.constexpr(self.values == [v.value if isinstance(v, core.constexpr) else v for v in values])

    core.block_type.__init__, core.tensor.__init__, core.tuple.__eq__ = type_init, tensor_init, equal


def _remember_dtypes(interpreter) -> None:
    """numpy's dtype of a Triton type: a table of 18 is built for each look into it."""
    plain, found = interpreter._get_np_dtype, {}

    def get_np_dtype(kind):
        if kind.name not in found:
            found[kind.name] = plain(kind)
        return found[kind.name]

    interpreter._get_np_dtype = get_np_dtype
