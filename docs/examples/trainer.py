"""Fine-tune a causal language model on the sentences of a JSON-lines file, key `text`.

    torchrun --nproc-per-node 2 docs/examples/trainer.py --model MODEL --data rows.jsonl --output_dir out ...

The arguments are TrainingArguments: `--fsdp`, `--deepspeed ds_config.json`, and so on.
To make it of a script for transformers' Trainer, one import, one class and `zo` changed.
"""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    TrainingArguments,
)

import zo_dist
from zo_dist.integrations.transformers import ZOTrainer


@dataclass
class Script:
    model: str
    data: str


def main() -> None:
    script, args = HfArgumentParser((Script, TrainingArguments)).parse_args_into_dataclasses()
    if args.use_cpu and args.deepspeed:
        # On GPUs transformers does it. Without, from_pretrained partitions for one process.
        import deepspeed

        deepspeed.init_distributed()
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    model = AutoModelForCausalLM.from_pretrained(script.model, dtype="auto")
    rows = load_dataset("json", data_files=script.data, split="train").train_test_split(test_size=0.2, seed=0)
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=64), remove_columns="text")
    trainer = ZOTrainer(
        model=model,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        zo={"eps": 1e-3, "directions": 4, "sampler": zo_dist.AdaLeZO(ratio=0.2)},
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    print(trainer.evaluate())
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
