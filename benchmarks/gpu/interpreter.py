"""Triton's interpreter without its largest overhead, for tests and dry runs of GPU kernels on a CPU."""

from triton.runtime import interpreter


def patch_language_once_per_launch() -> None:
    """Let the interpreter replace the functions of `triton.language` once per kernel launch.

    Triton 3.9 replaces them again at each call of a helper, with functions that do the same. Its search through
    `dir(triton.language)` at each of these calls takes half of the time of a kernel test.
    """
    patch = interpreter._patch_lang
    patched = set()

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

    interpreter._patch_lang = patch_once
