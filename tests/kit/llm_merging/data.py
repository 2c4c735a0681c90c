"""Read query files."""

import ast
import csv


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["answer_choices"] = ast.literal_eval(row["answer_choices"]) if row["answer_choices"] else []
    return rows
