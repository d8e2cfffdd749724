"""Triton's interpreter without its largest overheads, for tests and dry runs of GPU kernels on a CPU.

Every operation of a kernel is a call of several Python functions, which find the types of the operands and of the result. Numpy
takes a small part of the time. The functions of this module give the same results with fewer calls.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

FLOATS = ("fp32", "fp64")
HALF = ("fp16", "bf16")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@functools.cache
def speed_up_interpreter() -> None:
    """Replace slow functions of Triton's interpreter. Call it before the first launch of a kernel."""
    _patch_language_once_per_launch()
    _call_builtins_directly()
    _leave_out_unread_overflow_checks()
    _keep_types()
    _skip_promotion_of_equal_types()
    _scan_whole_blocks()


def replace(owner: object, name: str, make: Callable) -> None:
    """Replace the attribute `name` of `owner` by `make(original)`, which has the original as `__wrapped__`."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(make(original)))


def _patch_language_once_per_launch() -> None:
    """Let the interpreter replace the functions of `triton.language` once per kernel launch.

    Triton 3.9 replaces them again at each call of a helper, with functions that do the same. Its search through
    `dir(triton.language)` at each of these calls takes half of the time of a kernel test.
    """
    patched = set()

    def once(patch):
        def patch_once(function):
            module = id(function.__globals__)
            if module in patched:
                return interpreter._LangPatchScope()
            patched.add(module)
            scope = patch(function)
            restore = scope.restore

            def forget_and_restore():
                patched.clear()
                restore()

            scope.restore = forget_and_restore
            return scope

        return patch_once

    replace(interpreter, "_patch_lang", once)


def _call_builtins_directly() -> None:
    """Pass `_semantic` to a builtin without copying its keywords, and without the wrapper that checks that it was passed."""
    checked = core.builtin(lambda: None).__code__

    def patch_attribute(obj, name, member, builder, scope):
        function = member.__wrapped__ if getattr(member, "__code__", None) is checked else member

        def call(*arguments, **options):
            options["_semantic"] = interpreter.interpreter_semantic
            return function(*arguments, **options)

        scope.set_attr(obj, name, call)

    replace(interpreter, "_patch_attr", lambda _: patch_attribute)


def _leave_out_unread_overflow_checks() -> None:
    """Do not compute the check that an integer operation does not overflow.

    The interpreter computes it with six operations and passes it to `device_assert`, which ignores it unless `debug` is set.
    """
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _keep_types() -> None:
    """Construct each block type once, and compute what depends only on a type once per type."""
    blocks, numpy_types = {}, {}

    def new(cls, element_ty, shape):
        key = (element_ty.name, getattr(element_ty, "address_space", None), *map(core._unwrap_if_constexpr, shape))
        if key not in blocks:
            blocks[key] = object.__new__(cls)
        return blocks[key]

    def initialise_once(initialise):
        def init(self, element_ty, shape):
            if "name" not in self.__dict__:
                initialise(self, element_ty, shape)

        return init

    def tensor_of_kept_type(initialise):
        def init(self, handle, type):
            known = type.__dict__.get("layout")
            if known is None:
                initialise(self, handle, type)
                type.layout = self.shape, self.numel
            else:
                self.handle, self.type, self.dtype = handle, type, type.scalar
                self.shape, self.numel = known

        return init

    def numpy_type(find):
        def found(type):
            if type.__class__ is not core.dtype:
                return find(type)
            if type.name not in numpy_types:
                numpy_types[type.name] = find(type)
            return numpy_types[type.name]

        return found

    core.block_type.__new__ = new
    replace(core.block_type, "__init__", initialise_once)
    replace(core.tensor, "__init__", tensor_of_kept_type)
    replace(interpreter, "_get_np_dtype", numpy_type)
    replace(core.dtype, "__eq__", lambda equal: lambda self, other: self is other or equal(self, other))


def _skip_promotion_of_equal_types() -> None:
    """Return the operands of a binary operation at once if promotion does not change their types."""

    def check(promote):
        def checked(self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
            numbers = [isinstance(x, (int, float)) for x in (lhs, rhs)]
            tensor = rhs if numbers[0] else lhs
            name = getattr(tensor, "dtype", core.void).name
            unchanged = name in FLOATS or name in INTEGERS or (name in HALF and not div_or_mod)
            if any(numbers):
                whole = isinstance(lhs if numbers[0] else rhs, int)
                unchanged = unchanged and not all(numbers) and arithmetic_check and (whole or name not in INTEGERS)
            else:
                unchanged = unchanged and lhs.dtype is rhs.dtype
            if not unchanged:
                return promote(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)
            lhs, rhs = (
                self._cast_to_computation_type(x, tensor.dtype) if number else x
                for x, number in zip((lhs, rhs), numbers, strict=True)
            )
            return (lhs, rhs) if lhs.type is rhs.type else self.broadcast_impl_value(lhs, rhs)

        return checked

    replace(TritonSemantic, "binary_op_type_checking_impl", check)


def _scan_whole_blocks() -> None:
    """Scan in log2(N) calls of the combining function on whole blocks, in the order of a parallel scan.

    The interpreter calls it on one pair of numbers after the other, N - 1 times.
    """

    def scan(_):
        def scanned(self, input):
            tensors, axis = tuple(input), self.axis
            shape = tensors[0].handle.data.shape
            place = np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
            distance = 1
            while distance < shape[axis]:
                earlier = (self.to_tensor(np.roll(x.handle.data, distance, axis), x.dtype) for x in tensors)
                combined = self.combine_fn.fn(*earlier, *tensors)
                combined = combined if isinstance(combined, tuple) else (combined,)
                tensors = tuple(
                    self.to_tensor(np.where(place < distance, x.handle.data, y.handle.data), x.dtype)
                    for x, y in zip(tensors, combined, strict=True)
                )
                distance *= 2
            return list(tensors)

        return scanned

    replace(interpreter.ScanOps, "generic_scan", scan)
