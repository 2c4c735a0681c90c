"""The competition's base model and adapters, pinned to commits.

Knows hub ids only; what is known about each adapter is in configs/mistral-7b.yaml.
"""

BASE_MODEL_NAME = "mistralai/Mistral-7B-v0.1"
BASE_MODEL_REVISION_ID: str | None = "7231864981174d9bee8c7687c24c8344414eae6b"
"""Not named by the competition: the commit that public code pins, unverified, since the hub was not read.

`python -m search pin configs/mistral-7b.yaml` asks the hub for it and for those below; `main` is the newest.
"""

LIST_MODELS: list[tuple[str, str]] = [
    ("predibase/magicoder", "58d0eedad92a223cd45e94534450066952c6de25"),
    ("predibase/conllpp", "b9d370f421cb61389e345763ec629e50a58c2676"),
    ("predibase/dbpedia", "150202d7bc480c707c10f63e18a27ea742525919"),
    ("predibase/cnn", "dec34c493cc448bb8a8e322adf874198af3399b5"),
    ("predibase/agnews_explained", "8efbbefadd6a24b8df7a2697a13a321054b4f8f1"),
    ("predibase/gsm8k", "d54e59aa31095b6670d0b2717e0082e76660a0c1"),
    ("predibase/customer_support", "9ced8fd8cfdf0738c88308a3b56463c751e171f2"),
    ("predibase/glue_qnli", "84adee8f71fb017162b2377b1609e943e8e5f87a"),
    ("predibase/glue_mnli", "6b11be569cec9bc2cfc3fea08b06d2beff147432"),
    ("predibase/glue_sst2", "19fb298486384199e1be21caeb0e87ddc2140726"),
    ("predibase/glue_cola", "2b38f0b606a3b39cb24fc2d7e999e1554d044293"),
    ("predibase/glue_stsb", "44f8e617c942f4741031da0cb957612044d2b8a7"),
    ("predibase/glue_mrpc", "96901d9de7cc363f75b210c1252941f4843f3d32"),
    ("predibase/glue_qqp", "4b86489e836159fa10e961e12f84eff56834c8a6"),
    ("predibase/tldr_headline_gen", "fb10e14bf89c266758e85e7133c331f24b45b772"),
    ("predibase/tldr_content_gen", "a469234cef33e1a8cf01cba9a951ba6d17338907"),
    ("predibase/e2e_nlg", "757ae7637d4b0eff1b4453d7e8464819f795d3c1"),
    ("predibase/wikisql", "7b006817472931ae77f61a66876391a0cdbe4187"),
    ("predibase/hellaswag", "c284eacd1f99d15c542787b2efb09132a18e1cde"),
    ("predibase/hellaswag_processed", "1d2554e965a99a88b257cd6f05205fc54cddfb3b"),
    ("predibase/legal", "081528546ec576cf732a7c6859ca00f8e4c7d6a2"),
    ("predibase/jigsaw", "acaf3705a783cfdf828aa755c01159b78d7e71f5"),
    ("predibase/bc5cdr", "7037b22ecfeb247a04996a4b987f952af5e34aa2"),
    ("predibase/covid", "018d9afc9cf589d9f9208c361e9ca062cad5eae9"),
    ("predibase/drop", "233fe39f0e6f3d24d6490ca818f0ba548936e22a"),
    ("predibase/drop_explained", "665e89ee334284911191bc2e9eb05000c17f209c"),
    ("predibase/viggo", "3a45ff0a2bbd1fa0812400ea608bbbf6c08082e2"),
]
"""(hub id, commit) of the 27 adapters, as the competition names them; the hub was not read (unverified)."""
