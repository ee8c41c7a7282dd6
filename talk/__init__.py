"""Talking to a model, and seeing what it did meanwhile.

samples    pictures to ask about, what each can be asked, and what the toy will get wrong
typed      a typed line: a command, or words and the pictures that it names
chat       many turns with one model, in a terminal or through a pipe
interrupts Ctrl-C, heard each time that it is pressed, and once
inside     where each token of an answer looked, how sure it was, which experts computed it
page       what `inside` found, as a page or a picture
"""
