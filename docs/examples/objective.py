"""Train on a score of the texts that a model writes: the share of a text's words that it was allowed to use.

    torchrun --nproc-per-node 2 docs/examples/objective.py --model MODEL --steps 100

Nothing here has a gradient: the model writes, greedily, and a function of the text says how good it is.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zo_dist
from zo_dist.engines import initialize_process_group, leave_process_group

QUESTIONS = ["Is ice cold?", "Is fire cold?", "Do fish swim?", "Do stones swim?"]
ALLOWED = {"yes", "no"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-6)
    args = parser.parse_args()
    device = initialize_process_group()
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    batch = dict(tokenizer(QUESTIONS, return_tensors="pt", padding=True).to(device))

    write = zo_dist.TextGenerator(tokenizer, max_new_tokens=4, stop="\n")

    def score(model, batch):
        """Any function of a model and a batch that gives one number per row, the higher the better."""
        texts = [text.lower().split() for text in write(model, batch)]
        shares = [sum(word.strip(".,") in ALLOWED for word in text) / max(1, len(text)) for text in texts]
        return torch.tensor(shares)

    optimizer = zo_dist.ZeroOrder(model, lr=args.lr, eps=1e-2, directions=4, perturb="shard")
    for _ in range(args.steps):
        loss = optimizer.step_batch(batch, zo_dist.Objective(score))
    print(f"loss {loss:.3f}: {write(model, batch)}")
    leave_process_group()


if __name__ == "__main__":
    main()
