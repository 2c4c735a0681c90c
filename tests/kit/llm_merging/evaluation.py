"""Answer queries, one at a time, and write predictions."""

import csv
import os

import torch


def answer_dataset(method, rows, path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prediction", "dummy_field"])
        for row in rows:
            batch = {"input": [row["input"]], "answer_choices": [row["answer_choices"]]}
            with torch.no_grad():
                if row["eval_type"] == "multiple_choice":
                    prediction = str(method.predict_multiple_choice(batch)[0][0])
                else:
                    prediction = method.generate(batch)[1][0].strip() or "unknown"
            writer.writerow([row["id"], prediction, 0])
