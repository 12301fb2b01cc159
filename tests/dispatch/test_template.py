"""What the classifying model reads."""

from __future__ import annotations

from peft_svf.dispatch.template import RoutingTemplate, default_instruction
from peft_svf.experts import ExpertEntry


def test_the_default_instruction_names_every_label_and_description():
    text = default_instruction([ExpertEntry("math", "sums and word problems"), ExpertEntry("code")])
    assert "- math: sums and word problems" in text
    assert "- code\n" in text
    assert text.endswith("math, code or others.")


def test_the_instruction_is_the_system_message(character_tokenizer):
    assert RoutingTemplate(character_tokenizer, "Sort.").render("2+2?") == "[system]Sort.\n[user]2+2?\n[assistant]"


def test_without_a_system_role_the_instruction_goes_before_the_request(character_tokenizer):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    ignores = "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
    for template in (refuses + character_tokenizer.chat_template, ignores):
        character_tokenizer.chat_template = template
        assert RoutingTemplate(character_tokenizer, "Sort.").render("2+2?") == "[user]Sort.\n\n2+2?\n[assistant]"


def test_what_the_template_writes_before_the_answer_belongs_to_the_prompt(character_tokenizer):
    character_tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert RoutingTemplate(character_tokenizer, "Sort.").render("x").endswith("[user]x\n[assistant]<think></think>")


def test_without_a_chat_template_the_label_follows_a_colon(character_tokenizer):
    character_tokenizer.chat_template = None
    template = RoutingTemplate(character_tokenizer, "Sort.")
    assert template.render("2+2?") == "Sort.\n\n2+2?\nCategory:"
    assert character_tokenizer.decode(template.label_ids("math")) == " math"


def test_the_prefix_is_shared_by_all_prompts_and_ends_before_the_request(character_tokenizer):
    template = RoutingTemplate(character_tokenizer, "Sort.")
    assert character_tokenizer.decode(template.prefix_ids()) == "[system]Sort.\n[user]"
