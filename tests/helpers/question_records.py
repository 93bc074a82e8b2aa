"""Small data in the layouts of MedMCQA, Gretel's text-to-SQL, MetaMathQA and GSM8K."""

import json

TOWNS = ["Rome", "Paris", "London", "Lisbon"]


def med(question, cop=0, *, options=TOWNS, subject="Towns", **changes):
    """A record of MedMCQA, with all its fields."""
    fields = dict(zip(("opa", "opb", "opc", "opd"), options, strict=True))
    return {
        "id": "0a",
        "question": question,
        **fields,
        "cop": cop,
        "choice_type": "single",
        "exp": None,
        "subject_name": subject,
        "topic_name": None,
        **changes,
    }


SCHEMA = (
    "CREATE TABLE town (name TEXT, size INT); INSERT INTO town VALUES ('Rome', 3), ('Paris', 2);"
)


def sql(question, query, *, complexity="basic SQL", **changes):
    """A record of Gretel's, with the fields that matter and one that does not."""
    return {
        "id": 1,
        "domain": "towns",
        "sql_complexity": complexity,
        "sql_prompt": question,
        "sql_context": SCHEMA,
        "sql": query,
        **changes,
    }


def metamath(query, number, *, kind="GSM_Rephrased", **changes):
    """A record of MetaMathQA, with all its fields."""
    return {
        "type": kind,
        "query": query,
        "original_question": query,
        "response": f"We add both.\nThe answer is: {number}",
        **changes,
    }


def gsm8k(question, number):
    """A record of GSM8K."""
    return {"question": question, "answer": f"3 + 4 = <<3+4=7>>7 pens.\n#### {number}"}


def maths(count, tag=""):
    return [metamath(f"{tag}{i}: how many pens?", i) for i in range(count)]


def meds(count, tag=""):
    return [
        med(f"{tag}{i}: which town?", i % 4, subject="Even" if i % 2 == 0 else "Odd")
        for i in range(count)
    ]


def write(path, records):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(path)


def texts(*predictions):
    return [{"index": i, "prediction": text} for i, text in enumerate(predictions)]


def values(metrics):
    return {name: metric.value for name, metric in metrics.items()}
