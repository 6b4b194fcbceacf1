"""A row of each schema as its publisher writes it, and the problem that it has to be."""

from __future__ import annotations

import json
from typing import Any

STDIN = {"inputs": ["2 3\n"], "outputs": ["5\n"]}


ADD = "def add(a, b):\n    return a + b\n"


PRINT_SUM = "a, b = map(int, input().split())\nprint(a + b)\n"


CHECK_ADD = "def check(candidate):\n    assert candidate(2, 3) == 5\n"


# (schema, a row of it, what the problem has to be)
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "NuminaMath-1.5": (
        "numinamath",
        {
            **{"problem": "What is 2+3?", "solution": "It is \\boxed{5}.", "answer": "5", "problem_type": "Algebra"},
            **{"question_type": "math-word-problem", "problem_is_valid": "Yes", "solution_is_valid": "Yes"},
            **{"source": "olympiads", "synthetic": False},
        },
        {
            **{"source": "numinamath-olympiads", "answer": "5", "solution": "It is \\boxed{5}."},
            "info": {
                **{"question_type": "math-word-problem", "problem_type": "Algebra", "problem_is_valid": "Yes"},
                **{"solution_is_valid": "Yes", "synthetic": False},
            },
        },
    ),
    "DeepScaleR": (
        "deepscaler",
        {"problem": "What is 2+3?", "answer": "5", "solution": ""},
        {"answer": "5", "solution": "", "info": {}},
    ),
    "STILL-3": ("still3", {"question": "What is 2+3?", "answer": "5"}, {"answer": "5", "licence": "none stated"}),
    "Omni-MATH": (
        "omni_math",
        {
            **{"domain": ["Algebra -> Sums"], "difficulty": 4.5, "problem": "What is 2+3?", "solution": "5."},
            **{"answer": "5", "source": "a_contest"},
        },
        {"info": {"difficulty": 4.5, "domain": ["Algebra -> Sums"], "source": "a_contest"}, "solution": "5."},
    ),
    "AIME, DeepScaleR's": (
        "aime",
        {
            **{"problem": "What is 2+3?", "answer": "005", "solution": "It is 005.", "year": 1999, "aime_number": 1},
            **{"problem_number": 2, "difficulty": 3.0},
        },
        {
            "source": "aime",
            "answer": "005",
            "info": {"year": 1999, "aime_number": 1, "problem_number": 2, "difficulty": 3.0},
        },
    ),
    "AIME, Skywork's": (
        "aime",
        {
            "data_source": "test-math-aime24",
            "prompt": [
                {
                    "role": "user",
                    "content": "What is 2+3? Let's think step by step and output the final answer within \\boxed{}.",
                }
            ],
            **{"ability": "math", "reward_model": {"ground_truth": "5", "style": "rule"}},
            "extra_info": {"index": 0, "split": "test", "id": None},
        },
        {"source": "test-math-aime24", "answer": "5", "info": {"index": 0, "split": "test"}},
    ),
    "GSM8K": (
        "gsm8k",
        {"question": "What is 2+3?", "answer": "2+3=<<2+3=5>>5.\n#### 5"},
        {"answer": "5", "solution": "2+3=<<2+3=5>>5.\n#### 5"},
    ),
    "MATH, DeepScaleR's": (
        "math",
        {"problem": "What is 2+3?", "answer": "5", "difficulty": 1.0, "type": "Algebra"},
        {"answer": "5", "solution": "", "info": {"type": "Algebra", "difficulty": 1.0}},
    ),
    "MATH, its authors'": (
        "math",
        {"problem": "What is 2+3?", "level": "Level 1", "type": "Algebra", "solution": "So \\boxed{5}."},
        {"answer": "5", "solution": "So \\boxed{5}.", "info": {"type": "Algebra", "level": "Level 1"}},
    ),
    "Skywork-OR1, math": (
        "skywork_or1",
        {
            **{"data_source": "train-math-deepscaler", "prompt": [{"role": "user", "content": "What is 2+3?"}]},
            **{"ability": "math", "reward_model": {"ground_truth": '["5"]', "style": "rule"}},
            "extra_info": {"index": 7, "model_difficulty": {"DeepSeek-R1-Distill-Qwen-7B": 3}},
        },
        {
            **{"source": "train-math-deepscaler", "answer": "5"},
            "info": {"index": 7, "model_difficulty": {"DeepSeek-R1-Distill-Qwen-7B": 3}},
        },
    ),
    "Skywork-OR1, code": (
        "skywork_or1",
        {
            "data_source": "train-code-taco-easy",
            "prompt": "You are an expert Python programmer. Answer well.\n\n### Question:\nWhat is 2+3?",
            **{"ability": "code", "reward_model": {"ground_truth": json.dumps(STDIN), "style": "rule"}},
            "extra_info": {"index": 7, "model_difficulty": None},
        },
        {"source": "train-code-taco-easy", "ability": "code", "solution": ""},
    ),
    "LeetCodeDataset 0.2": (
        "leetcode",
        {
            **{"task_id": "add", "prompt": "import math\n", "completion": ADD, "entry_point": "add"},
            **{"test": CHECK_ADD, "query": "What is 2+3?", "response": "...", "input_output": []},
            "meta": {"question_id": 9, "difficulty": "Easy"},
        },
        {"solution": ADD.strip(), "info": {"question_id": 9, "difficulty": "Easy"}},
    ),
    "LeetCodeDataset 0.3": (
        "leetcode",
        {
            **{"task_id": "add", "question_id": 9, "difficulty": "Easy", "tags": ["Math"], "prompt": "import math\n"},
            **{"problem_description": "What is 2+3?", "starter_code": "def add(a, b):", "completion": ADD},
            **{"entry_point": "add", "test": CHECK_ADD, "query": "You are ..."},
        },
        {"problem": "What is 2+3?\n\nStarter code:\n\n```python\ndef add(a, b):\n```", "solution": ADD.strip()},
    ),
    "TACO": (
        "taco",
        {
            **{
                "question": "What is 2+3?",
                "solutions": json.dumps(["print 'Python 2'", PRINT_SUM]),
                "starter_code": "",
            },
            **{"input_output": json.dumps(STDIN), "difficulty": "EASY", "url": "https://there/1", "tags": "['Sums']"},
        },
        {
            "solution": PRINT_SUM,
            "info": {"difficulty": "EASY", "url": "https://there/1", "tags": "['Sums']", "num_solutions": 2},
        },
    ),
    "APPS, by call": (
        "apps",
        {
            **{"problem_id": 4, "question": "What is 2+3?", "solutions": json.dumps([ADD]), "difficulty": "interview"},
            "input_output": json.dumps({"fn_name": "add", "inputs": [[2, 3]], "outputs": [5]}),
        },
        {"problem": "What is 2+3?\n\nThe function is called `add`.", "solution": ADD},
    ),
    "MBPP": (
        "mbpp",
        {
            **{"text": "What is 2+3?", "code": ADD.replace("\n", "\r\n"), "task_id": 1, "test_setup_code": ""},
            **{"test_list": ["assert add(2, 3) == 5"], "challenge_test_list": ["assert add(0, 0) == 0"]},
        },
        {
            "solution": ADD,
            "problem": "What is 2+3?\n\nThe code should pass these tests:\n\n```python\nassert add(2, 3) == 5\n```",
        },
    ),
    "MBPP, sanitized": (
        "mbpp",
        {
            **{"prompt": "What is 2+3?", "code": ADD, "task_id": 1, "test_imports": ["import math"]},
            "test_list": ["assert math.isclose(add(2, 3), 5)"],
        },
        {"solution": ADD},
    ),
    "HumanEval": (
        "humaneval",
        {
            **{"task_id": "HumanEval/999", "prompt": 'def add(a, b):\n    """The sum."""\n', "entry_point": "add"},
            **{"test": CHECK_ADD, "canonical_solution": "    return a + b\n"},
        },
        {"solution": 'def add(a, b):\n    """The sum."""\n    return a + b\n'},
    ),
}
