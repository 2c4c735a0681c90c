"""The kit's command, as its contract states it: build the method, merge, save, answer one query at a time."""

import argparse
import os

from llm_merging.data import read_rows
from llm_merging.evaluation import answer_dataset
from llm_merging.merging import METHODS


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", "--merging_method", default="my_merge")
    parser.add_argument("--dataset_filepaths", nargs="+", default=["data/test.csv"])
    parser.add_argument("--output_folder", default="output")
    args = parser.parse_args()
    method = METHODS[args.merging_method](args.merging_method)
    method.merge()
    method.save_model(os.path.join(args.output_folder, args.merging_method))
    for path in args.dataset_filepaths:
        answer_dataset(method, read_rows(path), os.path.join(args.output_folder, os.path.basename(path)))


if __name__ == "__main__":
    main()
