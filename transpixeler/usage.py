"""Show how each command is used: examples for its help, and what stands here for the options of other programs."""

from __future__ import annotations

# Options of the programs that people come from, and what stands for them here.
OTHERS_OPTIONS = {
    "--config": "is the word behind the command: `transpixeler train CONFIG`; tools/migrate.py turns a TOML into one",
    "--resume_from_checkpoint": "is `--resume` here",
    "--reset_dataloader": "is `--resume RUN --restart-steps` here: a new run that begins with the checkpoint",
    "--reset_optimizer": "is `--resume RUN --weights-only` here",
    "--reset_optimizer_params": "is not needed: the learning rate is the config's; optim.force_lr fixes it",
    "--regenerate_cache": "is `transpixeler cache CONFIG --rebuild` here",
    "--cache_only": "is `transpixeler cache CONFIG` here",
    "--trust_cache": "is not needed: what a cache holds is not encoded again",
    "--dump_dataset": "is `transpixeler inspect CONFIG` here",
    "--i_know_what_i_am_doing": "is not known here; train.allow_changed lists what may differ from a checkpoint",
    "--deepspeed": "is not needed: `torchrun --nproc-per-node N -m transpixeler train CONFIG` uses several GPUs",
    "--deepspeed_config": "is not needed; the keys under `parallel` say how the model is spread",
    "--local_rank": "is not needed: torchrun tells each process its rank",
    "--master_port": "is torchrun's: `torchrun --master-port`",
    "--output_dir": "is a config key here: output_dir=DIR",
    "--pretrained_model_name_or_path": "is a config key here: model.path=FOLDER",
    "--learning_rate": "is a config key here: optim.lr=1e-4",
    "--max_train_steps": "is a config key here: train.max_steps=N",
}


EXAMPLES = {
    "demo": ("transpixeler demo demo", "transpixeler demo demo --depth --force"),
    "init": ("transpixeler init --family FAMILY --shape shape.json --encoders base --out fresh",),
    "plan": (
        "transpixeler plan my.yaml",
        "transpixeler plan my.yaml --gpus 8 --device h100",
        "transpixeler plan my.yaml data.frames=[49] --json",
    ),
    "cache": (
        "transpixeler cache my.yaml",
        "transpixeler cache my.yaml --verify",
        "torchrun --nproc-per-node 4 -m transpixeler cache my.yaml",
    ),
    "train": (
        "transpixeler train my.yaml",
        "transpixeler train my.yaml --dry-run",
        "torchrun --nproc-per-node 4 -m transpixeler train my.yaml optim.lr=5e-5",
        "transpixeler train my.yaml --resume",
        "transpixeler train my.yaml --resume output/latest --restart-steps",
    ),
    "eval": (
        "transpixeler eval output/latest",
        "transpixeler eval my.yaml --base",
        "transpixeler eval my.yaml --adapter other.safetensors eval.samples=2",
    ),
    "sample": (
        'transpixeler sample output/latest --prompt "a paper boat burns" --format mov',
        "transpixeler sample output/latest --prompts prompts.jsonl --out made --resume",
        'transpixeler sample output/latest --rgb clip.mp4 --prompt "grey smoke rises"',
        'transpixeler sample --model base --prompt "a boat" --size 832x480x33',
    ),
    "scorer": ("transpixeler scorer my.yaml", "torchrun --nproc-per-node 4 -m transpixeler scorer my.yaml --resume"),
    "inspect": ("transpixeler inspect clips", "transpixeler inspect my.yaml --out page.html"),
    "export": (
        "transpixeler export output/latest --format comfyui --out mine.safetensors",
        "transpixeler export output/latest --format merged --out model",
    ),
    "push": (
        "transpixeler push output/latest --repo user/name --dry-run",
        "transpixeler push output/latest --repo user/name --public",
    ),
    "report": (
        "transpixeler report output/latest",
        "transpixeler report output/first output/second --out compare.html",
    ),
    "schema": ("transpixeler schema --out config.schema.json",),
    "completion": (
        "transpixeler completion bash > ~/.local/share/bash-completion/completions/transpixeler",
        "transpixeler completion zsh > ~/.zfunc/_transpixeler",
    ),
}
