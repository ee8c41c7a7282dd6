"""Five pages to follow by hand: `make lesson` writes them, numbers change in the browser.

rows       three documents become packed rows, and none sees another
routing    four tokens are sent to three experts
trial      one trial of AdaLRS: is a higher rate faster?
group      a group of completions becomes a gradient, by GRPO and its relatives
mask       which tokens of a conversation are learned
page       what a lesson is, and its page
"""
