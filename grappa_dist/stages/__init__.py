"""Five stages: embed, pseudo_label, adapt, fuse, evaluate. Each reads artefacts and writes one."""
