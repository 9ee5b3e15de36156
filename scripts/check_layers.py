#!/usr/bin/env python3
"""Checks every #include against the layers that CMake declares: the second guard, which needs no build.

The order of the layers is read from the add_subdirectory lines of the root CMakeLists.txt, and what a layer may
include from its own tforge_layer(name DEPS ... USES ...): headers may name DEPS, sources also USES. Beyond what the
build itself refuses it finds parent-relative includes, includes that reach a layer only through another one, and
third-party headers outside the one folder that may see them.
"""
import pathlib
import re
import sys

# Third-party headers that stay behind one layer, or one folder of it, whatever its CMakeLists says.
FENCES = [
    (r"mpi\.h", {"parallel"}),
    (r"nccl\.h", {"parallel/cuda"}),
    (r"hdf5\.h|hdf5_hl\.h|H5\w+\.h", {"storage"}),
    (r"cblas\.h|openblas_config\.h|immintrin\.h", {"kernels"}),
    (r"toml\+\+/.*|toml\.hpp", {"train"}),
    (r"sentencepiece\w*\.h", {"data"}),
    (r"boost/.*", {"jobs"}),
    (r"cuda\w*\.h", {"core/cuda", "kernels/cuda", "parallel/cuda"}),
    (r"cublas\w*\.h", {"kernels/cuda"}),
    (r"gtest/.*|gmock/.*|benchmark/.*", set()),  # tests and benchmarks only
]
KEYWORDS = ("DEPS", "USES", "LIBS", "USES_LIBS", "CUDA_LIBS")


def declared_layers(root):
    """{layer: {"DEPS": set, "USES": set}} in the order of the root CMakeLists.txt."""
    order = re.findall(r"^\s*add_subdirectory\((\w+)\)", (root / "CMakeLists.txt").read_text(), re.M)
    layers = {}
    for name in order:
        text = re.sub(r"#.*", "", (root / name / "CMakeLists.txt").read_text())
        call = re.search(r"tforge_layer\(\s*(\w+)([^)]*)\)", text)
        if not call:
            continue
        layer, section = {"DEPS": set(), "USES": set()}, None
        for word in call[2].split():
            if word in KEYWORDS:
                section = word
            elif section in layer:
                layer[section].add(word)
        layers[name] = layer
    return order, layers


def check(root):
    order, layers = declared_layers(root)
    # jobs/ stands on top: it sees every layer, but is fenced from third-party headers like the rest.
    folders = [name for name in order if name in layers or name == "jobs"]
    faults = []
    for name, layer in layers.items():
        for dep in sorted(layer["DEPS"] | layer["USES"]):
            if dep not in order or order.index(dep) >= order.index(name):
                faults.append(f"{name}/CMakeLists.txt: {dep} is not below {name}")
    for top in folders:
        for path in sorted(p for p in (root / top).rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu")):
            header = path.suffix in (".h", ".cuh")
            if top in layers:
                allowed = {top} | layers[top]["DEPS"] | (set() if header else layers[top]["USES"])
            else:
                allowed = set(folders)
            for number, line in enumerate(path.read_text().splitlines(), 1):
                include = re.match(r'\s*#\s*include\s*[<"]([^>"]+)', line)
                if not include:
                    continue
                name, head, why = include[1], include[1].split("/")[0], None
                if ".." in name.split("/"):
                    why = "parent-relative include"
                elif head in folders and head not in allowed:
                    why = f"a {'header' if header else 'source'} of {top} may not include {head}"
                elif head in ("tests", "bench"):
                    why = "no layer may include tests or benchmarks"
                for pattern, homes in FENCES:
                    where = path.relative_to(root).as_posix()
                    if re.fullmatch(pattern, name) and not any(where.startswith(home + "/") for home in homes):
                        why = f"{name} belongs to {', '.join(sorted(homes)) or 'tests and bench'}"
                if why:
                    faults.append(f"{path.relative_to(root)}:{number}: {why}")
    return folders, faults


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent.parent).resolve()
    folders, faults = check(root)
    if len(folders) < 2:
        sys.exit(f"{root}/CMakeLists.txt: lists no layers")
    for fault in faults:
        print(fault)
    print(f"{len(faults)} faults" if faults else f"layering is kept: {' '.join(folders)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
