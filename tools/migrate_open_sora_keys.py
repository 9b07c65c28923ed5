"""Map the keys of a training config of Open-Sora to ours."""

from __future__ import annotations

# their key → ours, where the meaning is the same
SAME = {
    "epochs": "train.epochs",
    "seed": "seed",
    "grad_clip": "optim.clip",
    "warmup_steps": "optim.warmup_steps",
    "ema_decay": "optim.ema",
    "ckpt_every": "checkpoint.every_steps",
    "keep_n_latest": "checkpoint.keep",
    "async_io": "checkpoint.asynchronous",
    "log_every": "log.every_steps",
    "exp_name": "run_name",
    "dataset.fps_max": "data.fps",
    "optim.lr": "optim.lr",
    "optim.eps": "optim.eps",
    "optim.betas": "optim.betas",
    "optim.weight_decay": "optim.weight_decay",
    "lora_config.r": "lora.rank",
    "lora_config.lora_alpha": "lora.alpha",
    "lora_config.lora_dropout": "lora.dropout",
}
# weight of given frames → task
TASKS = {"t2v": "joint", "i2v_head": "image_to_video", "i2v_loop": "ends_to_video", "i2v_tail": "last_to_video"}
# our key → what it was there where the file does not say, if ours differs
UNSAID = {
    "train.epochs": 1000,
    "optim.betas": [0.9, 0.999],
    "optim.weight_decay": 0.0,
    "optim.warmup_steps": 0,
    "optim.clip": 0.0,
    "objective.caption_dropout": 0.0,
    "parallel.recompute": "full",
    "checkpoint.every_steps": 0,
}

_MODEL = "the base says it itself, in its own config (model.path)"
_ENCODERS = "the VAE and the text encoders are those of model.path, or of model.encoders"
_CACHE = "videos and texts are encoded once, into the cache (data.cache_dir); features of your own are columns"
_LOADER = "the loader reads ahead from the cache by itself; data.workers is for encoding"
_RESUME = "`transpixeler train --resume` goes on where a run was"
_TIMES = "metrics.jsonl has the times of every step"
_RECOMPUTE = (
    "parallel.recompute: N recomputes every N-th block, and parallel.keep_gb lets as many blocks as fit a budget keep "
    "what they computed"
)
_VIRTUAL = "there is no such split of a layer; parallel has pipeline, replicate and shard"
PARTS = ("model", "ae", "vae", "t5", "clip", "text_encoder")  # tables of what the base itself is
# their key, or the table that it is in → why it has no counterpart here
ABSENT = {
    "model": _MODEL,
    "ae": _ENCODERS,
    "vae": _ENCODERS,
    "t5": _ENCODERS,
    "clip": _ENCODERS,
    "text_encoder": _ENCODERS,
    "scheduler": "noise and target are the base's own; objective has what can be chosen",
    "is_causal_vae": _MODEL,
    "ae_spatial_compression": _MODEL,
    "patch_size": _MODEL,
    "grad_ckpt_settings": _RECOMPUTE,
    "model.grad_ckpt_settings": _RECOMPUTE,
    "pin_memory_cache_pre_alloc_numels": "pinned memory is taken as it is needed",
    "num_workers": _LOADER,
    "prefetch_factor": _LOADER,
    "num_bucket_build_workers": "sources are looked through once, by as many threads as the machine has room for",
    "cached_video": _CACHE,
    "cached_text": _CACHE,
    "dataset.cached_video": _CACHE,
    "dataset.cached_text": _CACHE,
    "dataset.type": "what a source holds is told by its files and columns",
    "dataset.memory_efficient": "manifests are always read row by row",
    "dataset.vmaf": "captions are used as the manifest says; write scores into its column text",
    "dataset.num_frames": "data.frames and data.buckets say which lengths there are",
    "dataset.image_size": "data.resolutions and data.buckets say which sizes there are",
    "dataset.frame_interval": "clips are resampled to data.fps; a third of the videos' rate takes every third frame",
    "dataset.transform_name": "clips are always scaled and cropped to fill their bucket",
    "batch_size": "each bucket has its own (bucket_config)",
    "mask_ratios": "objective.tasks gives first and last frames, and no others",
    "update_warmup_steps": _RESUME,
    "load": _RESUME,
    "start_epoch": _RESUME,
    "start_step": _RESUME,
    "initial_lr": _RESUME,
    "load_master_weights": _RESUME,
    "save_master_weights": "checkpoints always hold trained weights in fp32",
    "lora_checkpoint": "lora.init_from takes an adapter of the base that is trained here",
    "lora_config": "an adapter here is on linears of the base; lora has what can be chosen",
    "optim.adamw_mode": "weight decay is always AdamW's, apart from the gradient",
    "plugin": "parallel.pipeline, replicate and shard say how GPUs share the work",
    "plugin_config": "parallel.pipeline, replicate and shard say how GPUs share the work",
    "plugin_config.tp_size": _VIRTUAL,
    "wandb_project": "Weights & Biases is not enabled; log.wandb names a project",
    "wandb": "log.wandb names a project",
    "sigma_min": "at t = 0 a clip is clean",
    "warmup_ae": _CACHE,
    "record_time": _TIMES,
    "record_barrier": _TIMES,
    "nsys": _TIMES,
    "nsys_warmup_steps": _TIMES,
    "nsys_num_steps": _TIMES,
}
