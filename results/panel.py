"""Any CNN: φ in every classification CNN of torchvision up to 60 M parameters and in some of timm, one line each.

    ./run.sh panel                    # goes on where it stopped; results/panel.jsonl, results/panel.md
    ./run.sh panel --only resnet18 timm/repvgg_a0 --out /tmp/panel

A line says how many sites were found and in which modules, that 20 training steps on random images and an evaluation
after them are finite, that a network made anew and given the state predicts the same, and that `detach` leaves a
network that predicts as one without φ with the same weights.
"""

import argparse
import contextlib
import json
import re
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

import metaperturb
from metaperturb import UserError, models
from metaperturb.provenance import provenance
from metaperturb.storage import write_atomically

SIZES = [64, 96, 256, 224]
LARGEST, STEPS, BATCH, CLASSES, LR = 60e6, 20, 8, 10, 1e-3
COLUMNS = ("network", "size", "sites")
HEAD = (*COLUMNS, "in", "outcome")
TIMM = """
resnet10t resnet26d resnetv2_50 resnext50_32x4d res2net50_14w_8s resnest14d seresnet50 ecaresnet26t skresnet18
regnetz_b16 nf_regnet_b1 dla34 dla46_c hrnet_w18_small densenet121 dpn68 darknet53 cspresnet50 cs3darknet_s
vovnet39a ese_vovnet19b_dw mobilenetv1_100 mobilenetv2_100 mobilenetv3_small_100 mobilenetv4_conv_small_035
mnasnet_small fbnetc_100 spnasnet_100 tinynet_a ghostnet_100 ghostnetv2_100 ghostnetv3_050 mobileone_s0 repvgg_a0
repghostnet_100 fastvit_t8 mixnet_s efficientnet_b0 efficientnet_lite0 efficientnetv2_rw_t rexnet_100 lcnet_050
hardcorenas_a semnasnet_100 xception41 inception_v4 inception_resnet_v2 nasnetalarge pnasnet5large selecsls42b
vgg11_bn convnext_atto convnextv2_atto inception_next_tiny convmixer_768_32 efficientvit_b0 mobilevit_xxs
mobilevitv2_050 halonet26t lambda_resnet26t vit_tiny_patch16_224
""".split()  # noqa: SIM905


def networks() -> list[str]:
    return [*torchvision.models.list_models(module=torchvision.models), *(f"timm/{name}" for name in TIMM)]


def try_network(name: str, sizes: Sequence[int]) -> dict[str, object]:
    """What became of one network, by the headings of the table, on images of the first size that it takes."""
    make = lambda: models.create(name, CLASSES, sizes[0])  # noqa: E731
    torch.manual_seed(0)
    for device in ("meta", "cpu"):
        with contextlib.suppress(NotImplementedError), torch.device(device):  # some networks compute when they are made
            model, size = make(), sizes[0]
            if sum(p.numel() for p in model.parameters()) > LARGEST:
                return {"outcome": f"left out: more than {LARGEST / 1e6:.0f} M parameters"}
    try:
        attached(model, size)
    except UserError as error:
        return try_network(name, sizes[1:]) if len(sizes) > 1 else {"outcome": f"refused: {error}"}
    images, labels = torch.randn(32, 3, size, size), torch.randint(CLASSES, (32,))
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    for _ in range(STEPS):
        chosen = torch.randperm(len(images))[:BATCH]
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    again, places = attached(make(), size).eval(), [*map(str, model.metaperturb.specs)]
    again.load_state_dict(model.eval().state_dict())
    with torch.no_grad():
        torch.manual_seed(1)
        logits = model(images[:BATCH])
        torch.manual_seed(1)
        others = again(images[:BATCH])
        plain = make().eval()
        plain.load_state_dict(metaperturb.detach(model).state_dict())
        restored = torch.allclose(model(images[:2]), plain(images[:2]), rtol=0, atol=0, equal_nan=True)
    checks = {"training": loss.isfinite(), "evaluation": logits.isfinite().all(), "state": torch.equal(others, logits)}
    failed = [check for check, passed in {**checks, "detach": restored}.items() if not passed]
    return {"size": size, "sites": len(places), "places": places, "outcome": f"fails: {failed}" if failed else "ok"}


def attached(model: torch.nn.Module, size: int) -> torch.nn.Module:
    return metaperturb.attach(model, metaperturb.load_phi("tiny_imagenet_resnet20"), size, verbose=False)


def where(line: dict[str, object]) -> str:
    """The names of its sites, those alike but for numbers once."""
    names = [place.partition(":")[0] for place in line.get("places", [])]
    return ", ".join(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names)).replace("*", r"\*")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of networks")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help=f"sides of images {SIZES}")
    parser.add_argument("--out", type=Path, default=Path("results/panel"), help="path without suffix [results/panel]")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    record, page = (arguments.out.with_suffix(suffix) for suffix in (".jsonl", ".md"))
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    head = (
        f"# φ in other CNNs\n\n`./run.sh panel`: {STEPS} SGD steps of {BATCH} random images, learning rate {LR:g}, "
        f"seed 0.\nPyTorch {torch.__version__}, {provenance(torch.device('cpu'))['hardware']['cpu']}, "
        f"{torch.get_num_threads()} thread(s). A `*` stands for any number.\n\n"
    )
    for name in arguments.only or networks():
        if name in [line["network"] for line in lines]:
            continue
        start = time.time()
        try:
            found = try_network(name, arguments.sizes)
        except Exception as error:  # one network must not end the panel
            found = {"outcome": f"error: {type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        lines.append({"network": name, **found})
        print(f"{name}: {found.get('sites', '')} {found['outcome']} ({time.time() - start:.0f} s)", flush=True)
        rows = [[*(str(line.get(key, "")) for key in COLUMNS), where(line), line["outcome"]] for line in lines]
        table = [" | ".join(text.replace("|", "\\|") for text in row) for row in (HEAD, ["---"] * len(HEAD), *rows)]
        table = "\n".join(f"| {row} |" for row in table)
        for path, text in ((record, "\n".join(map(json.dumps, lines))), (page, head + table)):
            write_atomically(path, lambda file, text=text: file.write(f"{text}\n".encode()))


if __name__ == "__main__":
    main()
