"""Plot Armour: does a Baby Dragon Hatchling do what GPT-2 does, on my text, at my budget?"""

__version__ = "0.1.0"
